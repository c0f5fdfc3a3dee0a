"""After how many batches the ranks ask each other whether one of them was told to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from stabletrain.errors import UserError, is_whole
from stabletrain.runtime.checkpoints.preemption import StopBetweenBatches
from stabletrain.runtime.internals import sigterm

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from stabletrain.runtime.internals.packages import AnyTrainer


def check_sigterm_every(trainer: AnyTrainer, batches: int) -> None:
    """Let the ranks of a Trainer agree on a SIGTERM, and on clocks, only every few batches, and not after each.

    A rank that receives SIGTERM must not stop alone, so after each batch all ranks ask each other, once for Lightning
    and once for `SaveCheckpoints`; a third time if checkpoints are saved by time (``every="10min"``). Each is a
    collective, and on an accelerator a wait for the device. With this, Lightning does not ask, since `SaveCheckpoints`
    handles SIGTERM, and `SaveCheckpoints` asks after every ``batches``-th batch, at the last batch of an epoch, of a
    validation and of the run. With accumulation the run stops after the next optimizer step. Weights do not change.

    The run needs up to ``batches`` batches longer to stop: they must be done, and the checkpoint written, before the
    scheduler kills what has not ended (SLURM: 30 s by default).

    Args:
        trainer: before ``fit``; on all ranks, with the same number.
        batches: >= 1; 1: after each batch, as without this call.

    Raises:
        UserError: if the number is out of range, or no callback of the Trainer handles SIGTERM.
    """
    if not is_whole(batches) or batches < 1:
        raise UserError(f"check_sigterm_every: batches must be a whole number >= 1, got {batches!r}")
    mine = cast("Trainer", trainer)
    able = [each for each in mine.callbacks if isinstance(each, StopBetweenBatches)]  # type: ignore[attr-defined]
    if not any(getattr(each, "on_sigterm", True) for each in able):
        raise UserError(
            "check_sigterm_every: expected a Trainer with a callback that handles SIGTERM, got none: add "
            "SaveCheckpoints(on_sigterm=True). Without it Lightning's own handler needs the question after each batch"
        )
    sigterm.set_every(mine, int(batches))
