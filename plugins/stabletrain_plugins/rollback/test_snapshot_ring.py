"""Which snapshots a ring keeps, and which of them are trusted."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

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


def test_healthy_steps_make_a_snapshot_trusted() -> None:
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


def test_an_unhealthy_step_costs_five_healthy_ones() -> None:
    """Bug: with one skipped step in twenty no snapshot is ever trusted, and a rollback undoes thousands of steps."""
    ring = SnapshotRing(3, 25, Numbered)
    capture(ring, 1, *(i % 20 != 0 for i in range(1, 31)))
    assert trusted(ring) == []
    ring.on_outcome(True)
    assert trusted(ring) == [1], "19 - 5 + 11 are 25"
    capture(ring, 2, *(i % 5 == 0 for i in range(200)))
    assert trusted(ring) == [1], "one healthy step in five is not enough"


def test_a_full_ring_moves_on_and_always_has_a_trusted_snapshot() -> None:
    """Bug: where none becomes trusted any more, the last trusted one ages for ever, or is dropped without another."""
    ring = SnapshotRing(3, 3, Numbered)
    capture(ring, 1, True, True, True)
    for step in range(2, 9):
        capture(ring, step, True, False, True, False)
        assert steps(ring) == list(range(max(1, step - 2), step + 1))
        assert trusted(ring) == steps(ring)[:1]


def test_snapshots_of_undone_steps_are_dropped() -> None:
    """Bug: a snapshot of steps that were undone is restored later."""
    ring = SnapshotRing(3, 1, Numbered)
    for step in (1, 2, 3):
        capture(ring, step, True)
    ring.drop_after(ring.trusted[1])
    assert steps(ring) == [1, 2]
    capture(ring, 9)
    assert steps(ring) == [1, 2, 9]


def test_positions_in_a_replaced_loader_are_forgotten() -> None:
    """Bug: the positions keep the tape of the replaced loader, with all its batches, for ``keep`` snapshots."""
    ring = SnapshotRing(3, 1, Numbered)
    for step in (1, 2, 3):
        capture(ring, step, True)
        ring.trusted[-1].mark = step  # type: ignore[assignment]
    ring.forget_unreachable(SimpleNamespace(can_rewind=lambda mark: mark == 2))  # type: ignore[arg-type]
    assert [each.snapshot.mark for each in ring] == [None, 2, None]
    assert ring.oldest_mark == 2


def test_when_a_snapshot_is_due() -> None:
    """Bug: no snapshot for a whole interval because the step at its beginning was skipped or unhealthy."""

    def due(last: int) -> list[int]:
        ring = SnapshotRing(3, 1, Numbered)
        capture(ring, last)
        return [applied for applied in range(last, last + 18) if ring.is_due(applied, every=8)]

    assert [applied for applied in range(3) if SnapshotRing(3, 1, Numbered).is_due(applied, every=8)] == [1, 2]
    assert due(1) == list(range(2, 19))
    assert due(3) == list(range(6, 21))
    assert due(5) == list(range(8, 23)), "not at 10: `every` comes first"
    assert due(9) == list(range(16, 27))


@pytest.mark.parametrize("every", [1, 7, 25, 100])
def test_there_are_snapshots_of_the_first_steps(every: int) -> None:
    """Bug: an early fault is undone by a snapshot of step 1, and the second warm-up costs more than the fault."""
    ring = SnapshotRing(3, 1, Numbered)
    taken = []
    for applied in range(1, 201):
        if ring.is_due(applied, every):
            capture(ring, applied)
            taken.append(applied)
    early = [1 << i for i in range(8) if 1 << i < every]
    assert taken == early + [applied for applied in range(1, 201) if applied % every == 0]


def test_an_older_snapshot_is_trusted_no_later_than_a_newer_one() -> None:
    """Bug: a full ring drops its only trusted snapshot, and trusts one from within an incident instead."""
    numbers = random.Random(0)
    ring, taken = SnapshotRing(3, 5, Numbered), 0
    for step in range(1, 2000):
        ring.on_outcome(numbers.random() < 0.8)
        if numbers.random() < 0.2:
            ring.capture(step, None)  # type: ignore[arg-type]
            taken += 1
        flags = [each.trusted for each in ring]
        assert flags == sorted(flags, reverse=True)
        assert any(flags) or taken <= 3
