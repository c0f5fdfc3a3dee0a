"""How a decision becomes a complete intervention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stabletrain.core.events import Request, RequestKind
from stabletrain.runtime.data.tape import TapedBatch
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain.runtime.stop import TrainingStopped
from stabletrain_plugins.rollback import older_checkpoint
from stabletrain_plugins.rollback.decision import GiveUp
from stabletrain_plugins.rollback.incidents import Incident, IncidentTracker
from stabletrain_plugins.rollback.intervention import Intervention
from stabletrain_plugins.rollback.intervention_replay import InterventionReplay
from stabletrain_plugins.rollback.older_checkpoint import FoundCheckpoint
from stabletrain_plugins.rollback.planning import Plan, plan_repetition, plan_rollback
from stabletrain_plugins.rollback.rollback_rule import RollbackRule
from stabletrain_plugins.rollback.snapshot_ring import RingEntry, SnapshotRing

TAPE = [TapedBatch(None, 0, i, samples=[100 + i]) for i in range(9)]
"""Nine micro-batches, in windows of 2; marks are indices on the tape."""
REQUEST = Request(RequestKind.ROLLBACK, "somebody", "loss 9 > 3")


def plan(ring: SnapshotRing, processes: int = 1, reach: int = 0) -> Plan:
    """With a tape that reaches back to mark ``reach`` on rank 1, and further on this rank.

    Of a run with 40 attempted and 38 applied steps, in an incident since applied step 35 and batch 5."""
    trainer, window, ranks = SimpleNamespace(global_step=38), SimpleNamespace(size=2), SimpleNamespace(size=processes)
    ranks.any = lambda flag: flag or ring.oldest_mark < reach  # type: ignore[operator]
    ranks.gather = lambda value: [value, ()]
    guard: Any = SimpleNamespace(trainer=trainer, counters=SimpleNamespace(attempted=40), window=window, ranks=ranks)
    batches_since, can_rewind = lambda mark: dict(enumerate(TAPE[mark:])), lambda mark: True
    loader: Any = SimpleNamespace(loaders=[None], batches_since=batches_since, can_rewind=can_rewind)
    incidents = IncidentTracker(4)
    incidents.current = Incident(37, 35, 5)  # type: ignore[arg-type]
    found = plan_rollback(RollbackRule(rewarm=7), REQUEST, (), guard, loader, ring, incidents)
    assert isinstance(found, Plan)
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_with_a_checkpoint_the_batches_of_the_incident_are_excluded(
    monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Bug: a checkpoint from after the incident; other batches than the incident's; names that differ between ranks."""
    limits: list[int] = []
    found = FoundCheckpoint("/run/30.ckpt", 30)
    monkeypatch.setattr(older_checkpoint, "find", lambda trainer, before: limits.append(before) or found)
    by_position = tuple(("batch", 0, i) for i in range(5, 9))
    by_samples = tuple(("samples", 100 + i) for i in range(5, 9))
    names = (by_samples, ()) if processes == 1 else (by_position, by_samples)
    expected = Intervention(40, None, found.path, (38, 30), *names, 7, "restore", "somebody", "loss 9 > 3", False)
    assert plan(SnapshotRing(3, 25, Snapshot), processes) == Plan(expected, None)
    assert limits == [36]


def test_with_a_snapshot_whole_windows_are_excluded() -> None:
    """Bug: an intervention that is recorded incomplete, before its state is known."""
    ring, snapshot = SnapshotRing(3, 25, Snapshot), Snapshot()
    snapshot.step, snapshot.applied, snapshot.mark = 32, 30, 1  # type: ignore[assignment]
    ring.restart_with(snapshot)
    by_samples = tuple(("samples", 100 + i) for i in range(4, 9))
    expected = Intervention(40, 32, None, (38, 30), by_samples, (), 7, "restore", "somebody", "loss 9 > 3")
    assert plan(ring) == Plan(expected, snapshot)


def test_the_data_position_is_restored_on_all_ranks_or_on_none() -> None:
    """Bug: where the tape of one rank alone does not reach back, because its batches were larger, ranks read apart."""
    ring, snapshot = SnapshotRing(3, 25, Snapshot), Snapshot()
    snapshot.step, snapshot.applied, snapshot.mark = 32, 30, 1  # type: ignore[assignment]
    ring.restart_with(snapshot)
    assert plan(ring, 2, reach=1).intervention.rewound
    made = plan(ring, 2, reach=2).intervention
    assert (made.to, made.rewound) == (32, False)
    assert made.excluded == tuple(("batch", 0, i) for i in range(5, 9)), "those of the incident, for later epochs"


def test_damage_that_the_data_has_not_caused_is_undone_and_nothing_else() -> None:
    """Bugs: a snapshot from after the last good check restored, or an older one than need be; batches excluded or a
    warm-up begun for a flipped bit; a replay that trains on with it."""
    ring = []
    for step in (10, 20, 30):
        ring.append(RingEntry(Snapshot(), trusted=step == 10))
        ring[-1].snapshot.step, ring[-1].snapshot.applied, ring[-1].snapshot.mark = step, step - 1, 1  # type: ignore[assignment]
    trainer, ranks = SimpleNamespace(global_step=38), SimpleNamespace(any=lambda flag: flag)
    guard: Any = SimpleNamespace(trainer=trainer, counters=SimpleNamespace(attempted=40), ranks=ranks)
    loader: Any = SimpleNamespace(can_rewind=lambda mark: True)

    def found(good_at: int) -> Any:
        return plan_repetition(REQUEST._replace(good_at=good_at), guard, loader, ring)  # type: ignore[arg-type]

    same = Intervention(40, 20, None, (38, 19), (), (), 0, "restore", "somebody", "loss 9 > 3", repeats=True)
    assert found(25) == Plan(same, ring[1].snapshot)
    assert found(30).snapshot is ring[2].snapshot
    assert isinstance(found(9), GiveUp)
    replay = InterventionReplay([], 0, Snapshot)
    replay.ignore(REQUEST)
    with pytest.raises(TrainingStopped, match="loss 9 > 3; the log that is replayed"):
        replay.ignore(REQUEST._replace(good_at=25))
