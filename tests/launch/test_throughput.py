"""The speed that a run logs: right where it can be known exactly, and free of what is not training."""

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, SaveAfter, assert_same, batches, everything, fit, loader
from fits import Net as FitNet
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from stabletrain import SkipNonFinite
from stabletrain.launch.throughput import MeasureThroughput


class Clock:
    """A clock that moves only when it is told to, so that times are exact."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("stabletrain.launch.throughput.time.perf_counter", lambda: self.now)


class Tokens:
    """Batches of 4 sequences of 8 tokens; fetching each takes 1 s."""

    def __init__(self, clock: Clock, number: int) -> None:
        self.clock, self.number = clock, number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Any:
        for _ in range(self.number):
            self.clock.now += 1.0
            yield {"tokens": torch.ones(4, 8, dtype=torch.long)}


class Net(LightningModule):
    """A step takes 3 s, a validation 100 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.layer = clock, nn.Linear(8, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.clock.now += 3.0
        loss: Tensor = self.layer(batch["tokens"].float()).square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 100.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.001)


@pytest.mark.parametrize("size", [1, 2])
def test_the_numbers(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: validation, or the time before the first batch, is counted as training; the time of fetching is not;
    micro-batches count as steps; the samples of the next interval's first batch count twice; the last steps are
    missing; other steps than the plugins' metrics."""
    clock = Clock(monkeypatch)
    table = CSVLogger(tmp_path)
    options: dict[str, Any] = {"logger": table, "log_every_n_steps": 2, "accumulate_grad_batches": size}
    valid = loader([torch.zeros(1)])
    plugins = [MeasureThroughput(), SkipNonFinite()]
    mine = fit(Net(clock), Tokens(clock, 5 * size), *plugins, val_items=valid, max_epochs=2, **options)
    metrics = mine.callback_metrics
    rows = list(csv.DictReader((Path(table.log_dir) / "metrics.csv").read_text().splitlines()))
    steps = {int(row["step"]) for row in rows if row["throughput/step_s"]}
    assert steps == {1, 3, 5, 7, 9}
    assert steps <= {int(row["step"]) for row in rows if row["stability/loss"]}
    for row in rows:
        if row["throughput/step_s"] and row["step"] != "9":
            assert float(row["throughput/step_s"]) == pytest.approx(4.0 * size)
            assert float(row["throughput/data_wait_share"]) == pytest.approx(0.25)
            assert float(row["throughput/samples_per_s"]) == pytest.approx(1.0)
            assert float(row["throughput/tokens_per_s"]) == pytest.approx(8.0)
    assert 10 < metrics["throughput/peak_memory_mib"] < 1e6


def test_it_changes_nothing(tmp_path: Path) -> None:
    """Bugs: a bit of the run changes; the loop's methods stay replaced; the checkpoint has a state of it."""
    items = batches(*[HEALTHY] * 5)
    measured = MeasureThroughput()
    mine = fit(FitNet(), items, measured, SaveAfter(2, tmp_path / "a.ckpt"), max_epochs=2)
    assert_same(everything(mine), everything(fit(FitNet(), items, max_epochs=2)))
    assert "_on_before_fetch" not in vars(mine.fit_loop.epoch_loop)
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"] == {}
    failing = FitNet()
    failing.raise_at = 2
    other = MeasureThroughput()
    with pytest.raises(RuntimeError, match="own bug"):
        fit(failing, items, other)
    assert other._undo is None


def test_batches_that_hold_no_tensor() -> None:
    """Bug: a batch of plain Python numbers, or of a tensor that has no size, ends the run."""

    class Plain(FitNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((torch.ones(2, 6), 0), batch_idx)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested tensors", UserWarning)
        nested = [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])] * 3
    for items in ([1.0, 2.0, 3.0], nested):
        mine = fit(Plain(), items, MeasureThroughput())
        assert "throughput/step_s" in mine.callback_metrics
        assert "throughput/samples_per_s" not in mine.callback_metrics
