"""The result of one attempted optimizer step. Rules get all their information about training from it."""

from __future__ import annotations

from typing import NamedTuple


class Outcome(NamedTuple):
    """The scalars of one attempted step, identical on all ranks.

    Args:
        step: number of the attempted step, from 0.
        loss: training loss in nats (or the module's own unit): unscaled mean over the accumulation window and ranks.
        grad_norm: global L2 norm of the gradient, unscaled, before any transform or clipping.
        transformed_norm: the same norm after per-tensor transforms; equals ``grad_norm`` where there are none.
        applied_norm: norm of the gradient that the optimizer used, after all bounds; NaN for a skipped step.
        skipped: dropped by a rule, or because there was no loss.
        overflow: dropped by the fp16 loss scaler (gradient non-finite, loss finite); expected now and then.
        loss_scale: the scaler's scale at this step; 1 without a scaler.
        overflows_in_a_row: number of consecutive overflows up to and including this step; 0 if it is not an overflow.
        no_loss: ``training_step`` gave no loss, on one rank or more. Loss and norms are NaN; rules do not see the step.
    """

    step: int
    loss: float
    grad_norm: float
    transformed_norm: float
    applied_norm: float
    skipped: bool = False
    overflow: bool = False
    loss_scale: float = 1.0
    overflows_in_a_row: int = 0
    no_loss: bool = False

    @property
    def applied(self) -> bool:
        """Whether the step changed the parameters."""
        return not (self.skipped or self.overflow)

    @property
    def clipped(self) -> bool:
        """Whether a transform or a bound made the applied gradient smaller."""
        return self.applied and self.applied_norm < self.grad_norm
