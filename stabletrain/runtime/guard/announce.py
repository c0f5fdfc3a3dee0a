"""`announce`: a module or callback says that the training changes by design."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from stabletrain.errors import UserError
from stabletrain.runtime.guard.callbacks import GuardMember

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from stabletrain.runtime.internals.packages import AnyTrainer


def announce(trainer: AnyTrainer, reason: str) -> None:
    """Announce that the training changes by design, such as a second loss term or other data.

    From the step in which it is called, all plugins learn their baselines anew, as at the start of training, and judge
    nothing by the old ones; limits that are not learned (a fixed maximum norm, NaN, damaged weights) stay. Called
    before the optimizer step of a batch, as in ``on_train_batch_start`` or ``training_step``, it is in force for that
    step already; called after it, as in ``on_train_batch_end`` or during validation, from the next step on. An event
    ``announced`` with the reason is written to ``events.jsonl``.

    With several ranks a call on one of them suffices: it is in force on all ranks at the same step. After a rollback to
    before the change, the same code has to announce it again: decide by ``trainer.global_step``, or by state that a
    snapshot contains (see `stabletrain.runtime.guard.hooks.HasOwnState`).

    In a Trainer without stabletrain's plugins it does nothing, so that a module may always call it.

    Args:
        trainer: the Trainer in whose fit the change happens; in a module ``self.trainer``.
        reason: what changes, in a few words.

    Raises:
        UserError: outside a fit, before the optimizer exists or after ``on_train_end``, or if the arguments are not a
            Trainer and a text.
    """
    state = getattr(trainer, "state", None)
    if state is None or not isinstance(reason, str) or not reason.strip():
        got = f"({type(trainer).__name__}, {reason!r})"
        raise UserError(f'announce: expected a Trainer and what changes, as (trainer, "second loss term"), got {got}')
    if state.fn != "fit" or state.status != "running":
        raise UserError(
            f"announce: {reason!r} was announced outside a fit (Trainer.{state.fn or 'fit'}: {state.status}); expected "
            "a call while the Trainer trains. Call it in training_step or a hook from on_train_start on"
        )
    mine = cast("Trainer", trainer)
    members = [each for each in mine.callbacks if isinstance(each, GuardMember)]  # type: ignore[attr-defined]
    if members and not members[0].announce(mine, reason):
        raise UserError(
            f"announce: {reason!r} was announced before or after training; expected a call while the Trainer trains. "
            "Call it in training_step or a hook from on_train_start on"
        )
