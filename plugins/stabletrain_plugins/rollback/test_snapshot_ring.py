"""Which snapshots a ring keeps, and which of them are trusted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain_plugins.rollback.snapshot_ring import SnapshotRing


class Numbered(Snapshot):
    """Stores only its step."""

    def capture(self, guard: Any, loader: Any) -> None:
        self.step = self.applied = guard


def capture(ring: SnapshotRing, step: int, *healthy: bool) -> None:
    ring.capture(step, None)  # type: ignore[arg-type]
    for each in healthy:
        ring.on_outcome(each)


def steps(ring: SnapshotRing) -> list[int]:
    return [each.snapshot.step for each in ring]


def trusted(ring: SnapshotRing) -> list[int]:
    return [each.step for each in ring.trusted]


def test_only_healthy_steps_in_a_row_make_a_snapshot_trusted() -> None:
    """Bug: a snapshot of the beginning of an incident is restored."""
    ring = SnapshotRing(3, 3, Numbered)
    capture(ring, 1, True, True)
    assert trusted(ring) == []
    ring.on_outcome(False)
    ring.on_outcome(True)
    ring.on_outcome(True)
    assert trusted(ring) == []
    ring.on_outcome(True)
    assert trusted(ring) == [1]
    ring.on_outcome(False)
    assert trusted(ring) == [1], "a trusted snapshot stays trusted"


def test_a_new_snapshot_never_replaces_the_only_trusted_one() -> None:
    """Bug: the last good snapshot is overwritten by ones that never become trusted."""
    ring = SnapshotRing(2, 2, Numbered)
    capture(ring, 1, True, True)
    for step in (2, 3, 4):
        capture(ring, step, True, False)
    assert steps(ring) == [1, 4]
    capture(ring, 5, True, True)
    capture(ring, 6)
    assert steps(ring) == [5, 6]


def test_snapshots_of_undone_steps_are_dropped() -> None:
    """Bug: a snapshot of steps that were undone is restored later."""
    ring = SnapshotRing(3, 1, Numbered)
    for step in (1, 2, 3):
        capture(ring, step, True)
    ring.drop_after(ring.trusted[1])
    assert steps(ring) == [1, 2]
    capture(ring, 9)
    assert steps(ring) == [1, 2, 9]


def test_only_snapshots_that_the_tape_reaches_are_left() -> None:
    """Bug: a snapshot of a train loader that was replaced is restored by half, and then the tape raises."""
    ring = SnapshotRing(3, 1, Numbered)
    for step in (1, 2, 3):
        capture(ring, step, True)
        ring.trusted[-1].mark = step  # type: ignore[assignment]
    ring.drop_unreachable(SimpleNamespace(can_rewind=lambda mark: mark == 2))  # type: ignore[arg-type]
    assert steps(ring) == [2]


def test_when_a_snapshot_is_due() -> None:
    """Bug: no snapshot for a whole interval because the step at its beginning was skipped or unhealthy."""
    ring = SnapshotRing(3, 1, Numbered)
    assert not ring.is_due(0, every=8)
    assert ring.is_due(1, every=8)
    capture(ring, 1)
    assert [applied for applied in range(1, 18) if ring.is_due(applied, every=8)] == list(range(8, 18))
    capture(ring, 9)
    assert [applied for applied in range(9, 18) if ring.is_due(applied, every=8)] == [16, 17]
