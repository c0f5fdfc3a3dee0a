"""One test for each private attribute that is used where a module steps its optimizers by hand."""

from typing import Any

import torch
from fits import fit
from gan import Gan, batches
from lightning.pytorch import Callback

from stabletrain.runtime.internals import manual
from stabletrain.runtime.internals import trainer as trainer_internals


def test_after_manual_step() -> None:
    """Bug: nothing is called after a step by hand, or Lightning's own count of it is lost, or the wrapper stays."""
    counts: list[int] = []

    class Install(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.undo = manual.after_manual_step(trainer, lambda: counts.append(trainer.global_step))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.undo()
            if batch_idx == 2:
                trainer_internals.undo_global_step(trainer)
                counts.append(trainer.global_step)

    mine = fit(Gan(), batches([""] * 3), Install())
    assert counts == [1, 2, 3, 4, 5]
    assert mine.global_step == 5


def test_before_zero_grad() -> None:
    """Bug: gradients are removed through another object than the one that is watched, or the wrapper stays."""
    calls: list[int] = []

    class Install(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.undo = manual.before_zero_grad(
                trainer, lambda optimizer: calls.append(trainer.optimizers.index(optimizer))
            )

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.optimizers[1].zero_grad()
            self.undo()

    fit(Gan(), batches([""] * 2), Install())
    assert calls == [1, 0, 1]


def test_count_as_stepped() -> None:
    """Bug: torch warns of a schedule that is stepped before its optimizer's first step, which was dropped."""
    optimizer = torch.optim.SGD([torch.zeros(1)])
    manual.count_as_stepped(optimizer)
    assert "_opt_called" not in vars(optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    manual.count_as_stepped(optimizer)
    schedule.step()  # warnings are errors
