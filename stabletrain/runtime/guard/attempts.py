"""How many optimizer steps a run has attempted."""

from __future__ import annotations

from lightning.pytorch import Trainer

from stabletrain.runtime.guard.callbacks import GuardMember


def attempted_steps(trainer: Trainer, observe_from: int | None = None) -> int:
    """Return the number of attempted steps of the run, also before a resume; without plugins that of applied steps.

    Args:
        trainer: in a fit, once a checkpoint was loaded.
        observe_from: see `GuardMember.attempted`.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    member = next((each for each in callbacks if isinstance(each, GuardMember)), None)
    return trainer.global_step if member is None else member.attempted(observe_from)
