"""Making the interventions of an earlier run at the same steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stabletrain.errors import UserError
from stabletrain.runtime.data.train_loader import DataMark, TrainLoader
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain_plugins.rollback.interventions import Intervention


class InterventionReplay:
    """What is still to be made, and the snapshots that it goes back to.

    Args:
        planned: the interventions of the log.
        done: attempted steps so far; what came before is done, or was done by the run that is resumed.
        make: makes an empty snapshot.
    """

    def __init__(self, planned: Sequence[Intervention], done: int, make: Callable[[], Snapshot]) -> None:
        self._planned = {each.step: each for each in planned if each.step > done}
        self._make = make
        self._snapshots: dict[int, Snapshot] = {}

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be made."""
        return not self._planned

    def due(self, step: int) -> Intervention | None:
        """What is to be made after so many attempted steps."""
        return self._planned.get(step)

    def snapshot(self, guard: StepGuard, loader: TrainLoader) -> None:
        """Take a snapshot here, if one is needed later."""
        step = guard.decided
        if step not in self._snapshots and any(each.to == step for each in self._planned.values()):
            self._snapshots[step] = self._make()
            self._snapshots[step].capture(guard, loader)

    @property
    def oldest_mark(self) -> DataMark | None:
        """The oldest place of the data that will be gone back to; None if none is known yet."""
        return next((each.mark for each in self._snapshots.values()), None)

    def take(self, planned: Intervention) -> Snapshot | None:
        """The snapshot to restore for an intervention that is now being made; None: it goes back to a checkpoint.

        Raises:
            UserError: if the snapshot was never taken.
        """
        del self._planned[planned.step]
        if planned.to is None:
            return None
        if planned.to not in self._snapshots:
            raise UserError(
                f"rollback: at step {planned.step} the log goes back to step {planned.to}, where this run has not "
                "been: it was resumed in between. Replay the log from the start, or from an earlier checkpoint "
                "(config key plugins.spike.replay)"
            )
        snapshot = self._snapshots[planned.to]
        needed = {each.to for each in self._planned.values()}
        self._snapshots = {step: each for step, each in self._snapshots.items() if step in needed}
        return snapshot
