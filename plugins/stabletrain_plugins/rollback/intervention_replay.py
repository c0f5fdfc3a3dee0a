"""Makes the interventions of an earlier run again, at the same steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stabletrain.core.events import Request
from stabletrain.errors import UserError
from stabletrain.runtime.data.train_loader import DataMark, TrainLoader
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain.runtime.stop import TrainingStopped
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Intervention


class InterventionReplay:
    """The interventions still to be made, and the snapshots that they will restore.

    Args:
        planned: the interventions of the log.
        done: attempted steps so far; interventions up to there are part of the checkpoint that the run resumed from.
        make: makes an empty snapshot.
    """

    def __init__(
        self, planned: Sequence[Intervention | AcceptedLevel], done: int, make: Callable[[], Snapshot]
    ) -> None:
        self._planned = {each.step: each for each in planned if each.step > done}
        self._make = make
        self._snapshots: dict[int, Snapshot] = {}

    @property
    def is_over(self) -> bool:
        """Whether all interventions have been made."""
        return not self._planned

    @property
    def oldest_mark(self) -> DataMark | None:
        """The oldest data position that will be restored; None if no snapshot was taken yet."""
        planned = (each for each in self._planned.values() if isinstance(each, Intervention))
        rewound = {each.to for each in planned if each.rewound}
        return next((each.mark for step, each in self._snapshots.items() if step in rewound), None)

    def due(self, step: int) -> Intervention | AcceptedLevel | None:
        """The intervention to make after ``step`` attempted steps, if there is one."""
        return self._planned.get(step)

    def capture_if_needed(self, guard: StepGuard, loader: TrainLoader) -> None:
        """Take a snapshot if a later intervention restores this step."""
        step = guard.decided
        if step not in self._snapshots and step in self._needed():
            self._snapshots[step] = self._make()
            self._snapshots[step].capture(guard, loader)

    def ignore(self, request: Request | None) -> None:
        """Warn that a request is not executed, because the log has no intervention at this step.

        Raises:
            TrainingStopped: if the state is damaged by what is no part of the run that is replayed.
        """
        if request is not None and request.good_at is not None:
            raise TrainingStopped(request.plugin, f"{request.reason}; the log that is replayed has no rollback here")
        if request is not None:
            logger.warning(
                "rollback: a rollback is requested, but the log that is replayed has none at this step, so none is "
                "made: %s",
                request.reason,
            )

    def pop(self, intervention: Intervention | AcceptedLevel) -> Snapshot | None:
        """Remove an intervention from the plan; returns its snapshot, None if it restores none.

        Raises:
            UserError: if the snapshot was never taken.
        """
        del self._planned[intervention.step]
        if isinstance(intervention, AcceptedLevel) or intervention.to is None:
            return None
        if intervention.to not in self._snapshots:
            raise UserError(
                f"rollback: at step {intervention.step} the log restores step {intervention.to}, of which this run "
                "has no snapshot: it was resumed in between. Replay the log from the start, or from an earlier "
                "checkpoint (config key plugins.spike.replay)"
            )
        snapshot = self._snapshots[intervention.to]
        needed = self._needed()
        self._snapshots = {step: each for step, each in self._snapshots.items() if step in needed}
        return snapshot

    def _needed(self) -> set[int | None]:
        return {each.to for each in self._planned.values() if isinstance(each, Intervention)}
