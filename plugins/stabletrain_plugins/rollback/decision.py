"""Decides which state a rollback restores and which batches it excludes. Plain values only: no Trainer, no tensors."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from stabletrain_plugins.rollback.intervention import Intervention
from stabletrain_plugins.rollback.rollback_rule import Drop, RollbackRule


class SnapshotInfo(NamedTuple):
    """The step of a snapshot in memory.

    Args:
        step: attempted steps.
        applied: applied steps.
    """

    step: int
    applied: int


class Situation(NamedTuple):
    """What a decision depends on, besides the plugin's arguments.

    Args:
        attempted: attempted steps so far.
        applied: applied steps so far.
        made: all rollbacks of the run, oldest first.
        incident: applied steps before the first unhealthy step of the current incident; None: there is no incident.
        trusted: the trusted snapshots, oldest first.
        untrusted: the other snapshots, oldest first.
        damaged_after: attempted steps at the last check that found the weights undamaged, if damaged weights are the
            cause; else None.
    """

    attempted: int
    applied: int
    made: tuple[Intervention, ...] = ()
    incident: int | None = None
    trusted: tuple[SnapshotInfo, ...] = ()
    untrusted: tuple[SnapshotInfo, ...] = ()
    damaged_after: int | None = None

    @property
    def restorable(self) -> tuple[SnapshotInfo, ...]:
        """The snapshots that may be restored, oldest first.

        If the weights are damaged, not the data, trust is not needed: a check has found the weights of the snapshot
        undamaged, and so a nearer one can be restored. Its steps must still lie before the incident.
        """
        if self.damaged_after is None:
            return self.trusted
        good = [
            each
            for each in self.untrusted
            if each.step <= self.damaged_after and (self.incident is None or each.applied <= self.incident)
        ]
        return tuple(sorted((*self.trusted, *good)))

    @property
    def last_resort(self) -> SnapshotInfo | None:
        """The snapshot that is better than a stop: the oldest one from before the incident, trusted or not."""
        taken = sorted((*self.trusted, *self.untrusted))
        return next((each for each in taken if self.incident is None or each.applied <= self.incident), None)


class Exclusion(NamedTuple):
    """Which batches are not trained on again.

    Args:
        drop: ``"offending"``: those since the incident began; ``"since_snapshot"``: all since the snapshot; ``"none"``.
        at_least: with ``"offending"`` and a snapshot: exclude at least this many of the last micro-batches.
    """

    drop: Drop
    at_least: int = 0


class ToSnapshot(NamedTuple):
    """Restore a snapshot.

    Args:
        step: attempted steps of the snapshot.
        exclusion: the batches to exclude.
    """

    step: int
    exclusion: Exclusion


class GiveUp(NamedTuple):
    """Stop the run.

    Args:
        reason: for the user, with the config keys to change.
    """

    reason: str


class ToCheckpoint(NamedTuple):
    """Restore the newest good checkpoint on disk from before a step.

    Args:
        before: the checkpoint must have fewer applied steps than this.
        exclusion: the batches to exclude.
        otherwise: what to do if there is no such checkpoint.
    """

    before: int
    exclusion: Exclusion
    otherwise: ToSnapshot | GiveUp


Decision: TypeAlias = ToSnapshot | ToCheckpoint | GiveUp


def decide(rule: RollbackRule, situation: Situation, cause: str) -> Decision:
    """Decide how to execute a request for a rollback.

    The newest snapshot that may be restored is chosen (`Situation.restorable`). If the incident repeats the last one
    (`repeats_last`), only snapshots and checkpoints older than the state restored last time qualify. Without such a
    snapshot, a checkpoint from before the incident is restored; without one, the newest snapshot that may be restored,
    however new; without one, any from before the incident. After ``max_rollbacks``, and without any state to restore,
    the run is given up.

    Args:
        rule: the plugin's arguments.
        situation: the present state of the run.
        cause: the reason of the request.

    >>> rule = RollbackRule(drop="offending")
    >>> run = Situation(attempted=90, applied=88, trusted=(SnapshotInfo(26, 25), SnapshotInfo(51, 50)))
    >>> decide(rule, run, "loss 9.0 > 3.0")
    ToSnapshot(step=51, exclusion=Exclusion(drop='offending', at_least=0))
    """
    if len(situation.made) >= rule.max_rollbacks:
        return GiveUp(f"{len(situation.made)} rollbacks did not help (plugins.spike.max_rollbacks); now: {cause}")
    last = situation.made[-1] if repeats_last(rule, situation) else None
    exclusion = Exclusion(rule.drop)
    if last is not None and rule.drop == "offending":
        exclusion = Exclusion(rule.drop, at_least=max(1, 2 * len(last.excluded)))
    old_enough = [each for each in situation.restorable if last is None or each.applied < last.applied[1]]
    if old_enough:
        return ToSnapshot(old_enough[-1].step, exclusion)
    limits = [situation.applied]
    if situation.incident is not None:
        limits.append(situation.incident + 1)
    if last is not None:
        limits.append(last.applied[1])
    otherwise: ToSnapshot | GiveUp = GiveUp(_nothing_to_restore(situation, cause))
    if situation.restorable:
        otherwise = ToSnapshot(situation.restorable[-1].step, exclusion)
    elif situation.last_resort is not None:
        otherwise = ToSnapshot(situation.last_resort.step, exclusion)
    return ToCheckpoint(min(limits), Exclusion("none" if rule.drop == "none" else "offending"), otherwise)


def repeats_last(rule: RollbackRule, situation: Situation) -> bool:
    """Whether the run is still near the position in the data that the last rollback was made for.

    The steps undone by that rollback have to be made again to reach this position; ``cool_down`` counts from there.

    Args:
        rule: the plugin's arguments.
        situation: the present state of the run.
    """
    if not situation.made:
        return False
    last = situation.made[-1]
    return situation.attempted <= last.step + last.undone + rule.cool_down


def _nothing_to_restore(situation: Situation, cause: str) -> str:
    untrusted = "none was taken yet"
    if situation.untrusted:
        untrusted = f"the {len(situation.untrusted)} in memory were taken after the first unhealthy step"
    return f"there is no snapshot to restore ({untrusted}), and no checkpoint on disk from before; {cause}"
