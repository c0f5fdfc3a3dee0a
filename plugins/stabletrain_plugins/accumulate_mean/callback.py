"""The gradient of every accumulation window is the mean over its micro-batches, also of one that is not full."""

from __future__ import annotations

from typing import Any, ClassVar

from stabletrain.runtime.guard.callbacks import GuardMember


class AccumulateMean(GuardMember):
    """Make the gradient of each step the mean over the micro-batches that its accumulation window holds.

    With ``Trainer(accumulate_grad_batches=k)`` Lightning divides the loss of each micro-batch by k, also in the last
    window of an epoch, which may hold fewer: its gradient is then too small by held / k. With this plugin it is
    multiplied by k / held before anything measures or clips it. A micro-batch for which ``training_step`` returned None
    is not held. Windows of k micro-batches, and training without accumulation, do not change by a bit.

    The first such window of a fit is logged.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=[AccumulateMean()], logger=False, accelerator="cpu")
    """

    plugin: ClassVar[str] = "accumulate_mean"
    slot: ClassVar[str] = "accumulate"

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def guard_options(self) -> dict[str, Any]:
        """The guard weighs shorter windows."""
        return {"weigh_windows": True}
