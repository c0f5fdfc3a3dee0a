"""What a callback that is no plugin asks the plugins: how many steps were attempted, and whether the state is good."""

from __future__ import annotations

from lightning.pytorch import Trainer

from stabletrain.runtime.guard.callbacks import GuardMember


def attempted_steps(trainer: Trainer, observe_from: int | None = None) -> int:
    """Return the number of attempted steps of the run, also before a resume; without plugins that of applied steps.

    Args:
        trainer: in a fit, once a checkpoint was loaded.
        observe_from: see `GuardMember.attempted`.
    """
    member = _first_member(trainer)
    return trainer.global_step if member is None else member.attempted(observe_from)


def state_is_good(trainer: Trainer) -> bool:
    """Return whether no plugin finds damage in weights and optimizer state; the same on all ranks. A collective.

    Args:
        trainer: in a fit, between two steps.
    """
    member = _first_member(trainer)
    return member is None or member.state_is_good()


def _first_member(trainer: Trainer) -> GuardMember | None:
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, GuardMember)), None)
