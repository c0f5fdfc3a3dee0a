"""Windows of any size in Lightning's loop."""

from typing import Any

import pytest
from fits import HEALTHY, Net, batches, trainer
from fits import run as fit
from lightning.pytorch import Callback

from stabletrain.runtime.internals.trainer import window_is_open
from stabletrain.runtime.internals.windows import WindowControl


@pytest.mark.parametrize("none_at", [None, 2])
def test_windows_begin_and_end_where_they_should(none_at: int | None) -> None:
    """Bugs: a private name of Lightning's has changed; a window whose first batch is None keeps the old gradients."""
    sizes, zeros, ends = iter([2, 3, 2, 4]), [], []

    class Watch(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.control = WindowControl(trainer, lambda: next(sizes))

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            zeros.append(trainer.fit_loop.batch_idx)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if not window_is_open(trainer):
                ends.append(trainer.fit_loop.batch_idx)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.control.undo()

    items: list[Any] = batches(*[HEALTHY] * 9)
    if none_at is not None:
        items[none_at] = None
    mine = trainer(Watch())
    fit(mine, Net(), items)
    assert zeros == ([0, 2, 5, 7] if none_at is None else [0, 3, 5, 7])
    assert ends == [1, 4, 6, 8]
    assert mine.global_step == 4
    loop = mine.fit_loop.epoch_loop
    assert mine.accumulate_grad_batches == 1
    assert not {"_accumulated_batches_reached", "increment_ready"} & {*vars(loop), *vars(loop.batch_progress)}
