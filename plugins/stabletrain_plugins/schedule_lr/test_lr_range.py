import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from stabletrain import ClipNorm
from stabletrain.errors import UserError
from stabletrain.runtime.records.lr_range_file import read_lr_range
from stabletrain.runtime.records.run_files import LR_RANGE
from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.schedule_lr.lr_range import LRRange


class Quadratic(LightningModule):
    """Its loss becomes NaN at attempted step ``nan_from``; its two groups have rates 0.5 and 0.05."""

    def __init__(self, lr: float = 0.5, nan_from: int = 10**9) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
        self.lr, self.nan_from, self.seen = lr, nan_from, 0
        self.rates: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        self.seen += 1
        loss: Tensor = self.a.square().sum() + self.b.square().sum()
        return loss * math.nan if self.seen > self.nan_from else loss

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.a]}, {"params": [self.b], "lr": self.lr / 10}]
        optimizer = torch.optim.SGD(groups, lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def train(folder: Path, module: Quadratic, *callbacks: Any, steps: int = 30) -> Any:
    trainer = quiet_trainer(*callbacks, max_steps=steps, default_root_dir=str(folder))
    trainer.fit(module, torch.utils.data.DataLoader(range(7)))
    return trainer


@pytest.mark.parametrize("others", [(), (ClipNorm(1e9),)], ids=["alone", "with a plugin"])
@pytest.mark.parametrize("base", [None, 0.25])
def test_rates_and_file(tmp_path: Path, others: Any, base: float | None) -> None:
    """Bugs: without plugins nothing is recorded; groups lose their ratio; the module's own rate or scheduler counts;
    the recorded rate is that of the next step; the module's rates are not restored."""
    module, schedule = Quadratic(), LRRange(1e-4, 1e-2, 30, base)
    trainer = train(tmp_path, module, *map(copy.deepcopy, others), schedule)
    share = 1.0 if base is None else 0.5 / base
    points = read_lr_range(tmp_path / LR_RANGE)
    assert [point.rate for point in points] == pytest.approx([1e-4 * 100 ** (i / 29) for i in range(30)])
    assert [rates[0] for rates in module.rates] == pytest.approx([share * point.rate for point in points])
    assert all(rates[1] == pytest.approx(rates[0] / 10) for rates in module.rates)
    assert points[0].loss == 6.0
    assert points[-1].loss < points[0].loss
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize(
    ("module", "arguments", "most"),
    [(Quadratic(), (0.1, 100.0, 40), 39), (Quadratic(nan_from=12), (1e-4, 1e-2, 30), 17)],
    ids=["diverges", "NaN"],
)
def test_it_ends_when_the_loss_rises(tmp_path: Path, module: Quadratic, arguments: Any, most: int) -> None:
    """Bugs: it trains on at rates that diverge; its end is an error; the rows before the end are lost."""
    trainer = train(tmp_path, module, LRRange(*arguments), steps=arguments[2])
    points = read_lr_range(tmp_path / LR_RANGE)
    assert len(points) == trainer.global_step == module.seen <= most


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.0, 1.0), "start must be a number > 0"),
        ((1e-3, 1e-3), "stop must be a number > 0.001"),
        ((1e-3, math.inf), "stop must be"),
        ((math.nan, 1.0), "start must be"),
        ((1e-3, 1.0, 5), "steps must be a whole number >= 20"),
        ((1e-3, 1.0, 50, 0.0), "base must be"),
    ],
)
def test_bad_arguments(arguments: Any, expected: str) -> None:
    """Bug: a range that is empty, or a logarithm of 0, ends in a ValueError of math."""
    with pytest.raises(UserError, match=expected):
        LRRange(*arguments)


def test_an_optimizer_without_a_rate_is_refused(tmp_path: Path) -> None:
    """Bug: a division by 0."""
    with pytest.raises(UserError, match="expected an optimizer with a learning rate > 0"):
        train(tmp_path, Quadratic(lr=0.0), LRRange())
