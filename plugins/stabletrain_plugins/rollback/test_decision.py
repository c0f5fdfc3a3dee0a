"""Which state a rollback restores, which batches it excludes, and when it gives up: decided from plain values."""

from __future__ import annotations

from typing import Any

import pytest

from stabletrain_plugins.rollback.decision import (
    Decision,
    Exclusion,
    GiveUp,
    Situation,
    SnapshotInfo,
    ToCheckpoint,
    ToSnapshot,
    decide,
)
from stabletrain_plugins.rollback.intervention import Intervention
from stabletrain_plugins.rollback.rollback_rule import RollbackRule

TRUSTED = SnapshotInfo(26, 25), SnapshotInfo(52, 50), SnapshotInfo(79, 75)
"""Attempted steps are ahead of applied ones: some steps were skipped."""
OFFENDING = Exclusion("offending")


def made(step: int, to: int | None, applied: tuple[int, int], batches: int = 3) -> Intervention:
    excluded = tuple(("batch", 0, i) for i in range(batches))
    path = "old.ckpt" if to is None else None
    return Intervention(step, to, path, applied, excluded, (), 0, "restore", "plugin", "cause")


def decision(arguments: dict[str, Any] | None = None, **situation: Any) -> Decision:
    given = {"attempted": 100, "applied": 95, **situation}
    return decide(RollbackRule(**(arguments or {})), Situation(**given), "loss 9 > 3")


def test_the_newest_trusted_snapshot_is_restored() -> None:
    """Bug: an older one, which undoes more steps than needed."""
    assert decision(trusted=TRUSTED, incident=90) == ToSnapshot(79, OFFENDING)


LAST = made(step=100, to=80, applied=(95, 75))
"""A rollback that undid 20 attempted steps."""


@pytest.mark.parametrize(
    ("attempted", "step"),
    [(101, 52), (128, 52), (129, 79), (1000, 79)],
    ids=["at once", "last step of the cool-down", "after it", "much later"],
)
def test_the_cool_down_counts_from_where_the_last_incident_was(attempted: int, step: int) -> None:
    """Bug: it counts from the step of the rollback, though 20 undone steps come before the position of the incident.

    The snapshot restored last time (75 applied steps) is in the ring again, and does not qualify within the cool-down.
    """
    found = decision({"cool_down": 8}, attempted=attempted, applied=attempted - 20, made=(LAST,), trusted=TRUSTED)
    assert isinstance(found, ToSnapshot)
    assert found.step == step


def test_after_a_checkpoint_the_undone_applied_steps_count() -> None:
    """Bug: a rollback to a checkpoint undoes nothing, so that the cool-down ends too early."""
    last = made(step=100, to=None, applied=(95, 75))
    found = [decision({"cool_down": 8}, attempted=attempted, made=(last,), trusted=TRUSTED) for attempted in (128, 129)]
    assert [each.step for each in found if isinstance(each, ToSnapshot)] == [52, 79]


@pytest.mark.parametrize(("batches", "at_least"), [(0, 1), (1, 2), (3, 6), (200, 400)])
def test_a_repeated_incident_excludes_twice_as_many_batches(batches: int, at_least: int) -> None:
    """Bug: as many as before, which did not suffice; or none after a rollback that excluded none."""
    last = made(100, 80, (95, 75), batches)
    assert decision(attempted=110, made=(last,), trusted=TRUSTED) == ToSnapshot(52, Exclusion("offending", at_least))
    assert decision(attempted=900, made=(last,), trusted=TRUSTED) == ToSnapshot(79, OFFENDING)


@pytest.mark.parametrize("drop", ["since_snapshot", "none"])
def test_other_choices_of_batches_do_not_grow(drop: str) -> None:
    """Bug: ``drop="none"`` excludes batches after all when an incident repeats."""
    found = decision({"drop": drop}, attempted=110, made=(LAST,), trusted=TRUSTED)
    assert found == ToSnapshot(52, Exclusion(drop))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("situation", "before"),
    [
        ({}, 95),  # before now
        ({"incident": 90}, 91),  # 90 steps were applied before the first unhealthy one: that state is good
        ({"incident": 95}, 95),  # the unhealthy steps were all skipped: a checkpoint of now is not older
        ({"made": (made(99, 70, (95, 60)),)}, 60),  # repeated: older than what was restored last time
        ({"made": (made(99, 70, (95, 60)),), "incident": 40}, 41),
    ],
)
def test_without_a_snapshot_a_checkpoint_from_before_the_incident_is_restored(
    situation: dict[str, Any], before: int
) -> None:
    """Bug: a checkpoint with the damage in it, or once more the state that did not help."""
    found = decision(**situation)
    assert isinstance(found, ToCheckpoint)
    assert found.before == before
    assert found.exclusion == OFFENDING
    assert isinstance(found.otherwise, GiveUp)


def test_a_repeated_incident_prefers_an_old_checkpoint_to_a_new_snapshot() -> None:
    """Bug: a loop between one snapshot and one incident; or a stop although a snapshot is left."""
    newer = (*TRUSTED[2:], SnapshotInfo(106, 101))
    found = decision({"drop": "since_snapshot"}, attempted=110, made=(LAST,), trusted=newer)
    assert found == ToCheckpoint(75, OFFENDING, otherwise=ToSnapshot(106, Exclusion("since_snapshot")))
    found = decision(attempted=110, made=(LAST,), trusted=newer)
    assert found == ToCheckpoint(75, OFFENDING, otherwise=ToSnapshot(106, Exclusion("offending", 6)))


def test_no_batches_are_excluded_with_a_checkpoint_if_none_shall_be() -> None:
    """Bug: ``drop="none"`` excludes the batches of the incident, because a checkpoint is restored."""
    found = decision({"drop": "none"}, incident=90)
    assert isinstance(found, ToCheckpoint)
    assert found.exclusion == Exclusion("none")


def test_the_budget() -> None:
    """Bug: one rollback too many or too few; a run that goes back for ever."""
    rollbacks = tuple(made(step, step - 20, (step, step - 20)) for step in (300, 600, 900))
    last = decision({"max_rollbacks": 3}, attempted=2000, made=rollbacks[:2], trusted=TRUSTED)
    assert last == ToSnapshot(79, OFFENDING)
    over = decision({"max_rollbacks": 3}, attempted=2000, made=rollbacks, trusted=TRUSTED)
    assert over == GiveUp("3 rollbacks did not help (plugins.spike.max_rollbacks); now: loss 9 > 3")


@pytest.mark.parametrize(
    ("untrusted", "message"),
    [((), "none was taken yet"), (TRUSTED[1:], "the 2 in memory were taken after the first unhealthy step")],
)
def test_the_reason_to_give_up(untrusted: tuple[SnapshotInfo, ...], message: str) -> None:
    """Bug: a stop that does not say what was missing."""
    found = decision(untrusted=untrusted, incident=49)
    assert isinstance(found, ToCheckpoint)
    assert found.otherwise == GiveUp(
        f"there is no snapshot to restore ({message}), and no checkpoint on disk from before; loss 9 > 3"
    )


@pytest.mark.parametrize(("incident", "step"), [(None, 26), (90, 26), (25, 26), (24, None)])
def test_an_untrusted_snapshot_is_better_than_a_stop(incident: int | None, step: int | None) -> None:
    """Bugs: a stop in the first 25 steps although there are snapshots; or one with the damage in it is restored."""
    found = decision(untrusted=TRUSTED, incident=incident)
    assert isinstance(found, ToCheckpoint), "a checkpoint is better"
    assert isinstance(found.otherwise, GiveUp) == (step is None)
    assert step is None or found.otherwise == ToSnapshot(step, OFFENDING)


@pytest.mark.parametrize(
    ("damaged_after", "incident", "step"),
    [
        (None, 90, 52),  # the data are to blame: trust is needed
        (79, 90, 79),  # checked at the step of the snapshot: its weights were good
        (78, 90, 52),  # checked before it: the damage may be in it
        (99, 75, 79),  # the incident began right after the snapshot
        (99, 74, 52),  # the snapshot is of a step within the incident
        (99, None, 79),
        (0, 90, 52),  # there was no check
    ],
)
def test_damaged_weights_restore_a_nearer_snapshot(damaged_after: int | None, incident: int | None, step: int) -> None:
    """Bugs: 25 more steps undone than needed; or a snapshot that has the damage, or the incident, in it."""
    situation = {"trusted": TRUSTED[:2], "untrusted": TRUSTED[2:], "damaged_after": damaged_after, "incident": incident}
    found = decision(**situation)
    assert found == ToSnapshot(step, OFFENDING)


def test_damaged_weights_again_restore_an_older_snapshot() -> None:
    """Bug: a loop between damage and one snapshot that no check has found to be damaged."""
    situation = {"trusted": TRUSTED[:2], "untrusted": TRUSTED[2:], "damaged_after": 99, "made": (LAST,)}
    assert decision(attempted=110, **situation) == ToSnapshot(52, Exclusion("offending", 6))
