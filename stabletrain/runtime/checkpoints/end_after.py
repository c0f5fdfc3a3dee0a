"""`EndAfter`: end a fit after a number of attempted steps, while all that follows from ``max_steps`` stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from stabletrain.errors import UserError
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.checkpoints.save_now import save_now
from stabletrain.runtime.guard.attempts import attempted_steps
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.records.run_files import CHECKPOINTS
from stabletrain.runtime.stop import EndReached


class EndAfter(Callback):
    """End the fit after a number of attempted steps, between two batches, with an `EndReached` on all ranks.

    Unlike ``max_steps``, it changes nothing before: schedules, lengths such as ``2%`` and validation follow from the
    Trainer's own arguments. Steps are counted over the whole run, also before a resume. Without plugins, applied steps
    are counted; then no step is dropped. There is no validation after the last step.

    Args:
        steps: attempted steps, >= 1.
        save: whether to save a checkpoint at the end, from which the run can be resumed.
    """

    def __init__(self, steps: int, save: bool = False) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps: expected a number of steps, at least 1, got {steps!r}")
        self.steps, self.save = steps, save

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the fit if there were as many steps."""
        made = attempted_steps(trainer, observe_from=self.steps)
        if made < self.steps or AccumulationWindow(trainer).is_open:
            return
        checkpoint = save_now(trainer, Path(trainer.default_root_dir) / CHECKPOINTS) if self.save else None
        raise EndReached(f"ended after {made} attempted steps, as it was asked to", checkpoint)
