"""The noise scale of a toy whose noise is known, and where it is not defined."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, Net, SaveAfter, batches, everything, fit, loader
from lightning.pytorch import LightningModule
from out_of_memory import Hungry
from torch import nn

from stabletrain import AccumulateAuto, AccumulateTokens, MeasureNoiseScale, ResumeExactly, SkipNonFinite, UserError
from stabletrain_plugins.measure_noise_scale.estimate import Averages, Window, estimate

SIZE = 200
MEAN = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)) * 0.1
NOISE = torch.rand(SIZE, generator=torch.Generator().manual_seed(1)) * 2
SQUARE, TRACE = float(MEAN.square().sum()), float(NOISE.square().sum())


class Toy(LightningModule):
    """The gradient of a row is the row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(SIZE // 2)), nn.Parameter(torch.zeros(SIZE // 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (batch * torch.cat([self.a, self.b])).sum(1).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-6)


def rows(steps: int, counts: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [MEAN + NOISE * torch.randn(n, SIZE, generator=draw) for _ in range(steps) for n in counts]


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(4, 4, 4, 4), (1, 2, 3, 10)])
@pytest.mark.parametrize("weights", [(), (AccumulateTokens(),)], ids=["means", "tokens"])
def test_the_noise_of_a_toy(counts: tuple[int, ...], weights: Any) -> None:
    """Bugs: an average of ratios (off by 40 % after 100 steps); the running sum in place of a micro-batch's gradient;
    a factor of the window's size; counts or weights of micro-batches that differ are taken as equal."""
    plugin = MeasureNoiseScale()
    fit(Toy(), rows(2000, counts), plugin, *weights, accumulate_grad_batches=4, log_every_n_steps=500)
    found = plugin.metrics()
    assert found["noise_scale"] == pytest.approx(TRACE / SQUARE, rel=0.05)
    assert found["noise_scale_square"] == pytest.approx(SQUARE, rel=0.05)
    assert found["noise_scale_trace"] == pytest.approx(TRACE, rel=0.05)


def test_one_step_by_hand() -> None:
    """Bugs: as above, in a few milliseconds; under a loss scaler; a window with a weighted mean."""
    items = rows(1, (1, 2, 3, 10))
    means = [each.mean(0) for each in items]
    small, inverse = sum(float(g.square().sum()) for g in means), sum(1 / n for n in (1, 2, 3, 10))
    for weights, plugins in (((1.0,) * 4, ()), ((1.0, 2.0, 3.0, 10.0), (AccumulateTokens(),))):
        total = sum(weights)
        big = sum(w * g for w, g in zip(weights, means, strict=True)) / total
        assert isinstance(big, torch.Tensor)
        square = sum(w * w / n for w, n in zip(weights, (1, 2, 3, 10), strict=True))
        expected = estimate(Window(small, inverse, square, total, 4.0), float(big.norm()))
        for fp16 in (False, True):
            plugin = MeasureNoiseScale()
            fit(Toy(), items, plugin, *plugins, accumulate_grad_batches=4, fp16=fp16)
            found = plugin.metrics()
            assert expected == pytest.approx((found["noise_scale_square"], found["noise_scale_trace"]), rel=1e-3)


def test_averages_of_the_two_not_of_ratios() -> None:
    """Bug: the mean of ratios."""
    averages = Averages()
    for pair in ((1.0, 2.0), (-0.5, 4.0), (1.0, 3.0)):
        averages = averages.add(*pair, decay=0.5)
    assert averages.scale == pytest.approx((2 / 8 + 4 / 4 + 3 / 2) / (1 / 8 - 0.5 / 4 + 1 / 2))
    assert Averages(-1.0, 1.0, 1.0).scale is None
    assert estimate(Window(1.0, 1.0, 1.0, 1.0, 1.0), 1.0) is None
    assert estimate(Window(float("nan"), 1.0, 0.5, 2.0, 2.0), 1.0) is None


def test_dropped_steps_and_resumed_runs(tmp_path: Path) -> None:
    """Bugs: a dropped step enters the averages; a checkpoint lacks them; measuring changes the run."""

    def run(items: Any, *plugins: Any, **options: Any) -> tuple[Any, Any]:
        plugin = MeasureNoiseScale()
        mine = (plugin, SkipNonFinite(), ResumeExactly(), *plugins)
        trained = fit(Net(), items, *mine, accumulate_grad_batches=2, **options)
        return plugin.averages, trained

    good = batches(*[HEALTHY] * 8)
    expected, trainer = run(good)
    spoilt = [*good[:4], *batches(HEALTHY, NAN_LOSS), *good[4:]]
    found, other = run(spoilt)
    assert found == expected
    plain = everything(fit(Net(), good, SkipNonFinite(), ResumeExactly(), accumulate_grad_batches=2))
    for mine in (trainer, other):
        assert all(torch.equal(value, plain[key]) for key, value in everything(mine).items())
    for cut in (1, 2, 3):
        run(good, SaveAfter(cut, tmp_path / f"{cut}.ckpt"))
        assert run(good, ckpt_path=tmp_path / f"{cut}.ckpt")[0] == expected


def test_a_micro_batch_in_pieces_is_not_measured() -> None:
    """Bug: the squares of pieces are taken for those of micro-batches."""
    plugin = MeasureNoiseScale()
    fit(Hungry(3), batches(*[HEALTHY] * 4), plugin, AccumulateAuto(), accumulate_grad_batches=2)
    assert plugin.metrics() == {}


def test_where_it_is_not_defined() -> None:
    """Bugs: a division by zero; an infinite noise scale; a bad argument."""
    with pytest.raises(UserError, match="one micro-batch on one rank"):
        fit(Net(), batches(HEALTHY), MeasureNoiseScale())
    plugin = MeasureNoiseScale()
    fit(Net(), loader(batches(*[HEALTHY] * 3)), plugin, accumulate_grad_batches=2)  # the last window has one
    assert plugin.averages.weight == pytest.approx(0.001)
    for arguments in ({"every": 0}, {"decay": 1.0}, {"decay": 0}, {"count": 1.5}, {"ignore_index": "a"}):
        with pytest.raises(UserError, match="must be"):
            MeasureNoiseScale(**arguments)  # type: ignore[arg-type]
