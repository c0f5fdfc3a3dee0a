"""The last few snapshots of a run, and which of them are trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stabletrain.runtime.data.train_loader import DataMark, TrainLoader
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.snapshots.snapshot import Snapshot, state_bytes

UNHEALTHY_COSTS = 5
"""Healthy steps that an unhealthy one costs: with one in twenty, snapshots still become trusted."""


class RingEntry:
    """A snapshot in the ring.

    Args:
        snapshot: the state.
        trusted: whether it may be restored.
    """

    def __init__(self, snapshot: Snapshot, trusted: bool = False) -> None:
        self.snapshot = snapshot
        self.trusted = trusted
        self.healthy = 0
        """Healthy steps since the snapshot, less those that unhealthy ones cost; counted until it is trusted."""


class SnapshotRing:
    """The last snapshots, oldest first; one becomes trusted after ``trust_after`` healthy steps.

    A full ring always moves on, so that no rollback goes back further than ``keep`` snapshots: if a run has so many
    unhealthy steps that no newer one becomes trusted, the oldest is trusted, since no rollback was needed after it.

    Args:
        keep: number of snapshots, >= 2: one not trusted yet, and those that can be restored.
        trust_after: healthy steps after the snapshot that make it trusted; an unhealthy one costs `UNHEALTHY_COSTS`.
        make: makes an empty snapshot.
    """

    def __init__(self, keep: int, trust_after: int, make: Callable[[], Snapshot]) -> None:
        self._keep, self._trust_after, self._make = keep, trust_after, make
        self._entries: list[RingEntry] = []
        self._spare: list[Snapshot] = []

    def __iter__(self) -> Iterator[RingEntry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def newest(self) -> RingEntry | None:
        """The snapshot taken last."""
        return self._entries[-1] if self._entries else None

    @property
    def oldest_mark(self) -> DataMark | None:
        """The oldest data position of a snapshot; None if there is none."""
        return next((each.snapshot.mark for each in self._entries if each.snapshot.mark is not None), None)

    @property
    def trusted(self) -> list[Snapshot]:
        """The trusted snapshots, oldest first."""
        return [each.snapshot for each in self._entries if each.trusted]

    def is_due(self, applied: int, every: int) -> bool:
        """Whether it is time for a snapshot: at each multiple of ``every``, and before at 1, 2, 4, 8, ... steps.

        Args:
            applied: applied steps so far.
            every: applied steps from one snapshot to the next; if no snapshot was taken
                at a multiple, one is due at the next call.
        """
        if self.newest is None:
            return applied > 0
        last = self.newest.snapshot.applied
        return applied // every != last // every or 2 * last <= applied < every

    def bytes_needed(self, guard: StepGuard) -> int:
        """Memory of the full ring on this rank, bytes."""
        return self._keep * state_bytes(guard)

    def prepare(self, guard: StepGuard) -> None:
        """Allocate the memory of all snapshots, so that taking one later costs the copy alone."""
        while len(self._entries) + len(self._spare) < self._keep:
            self._spare.append(self._make())
        for snapshot in self._spare:
            snapshot.prepare(guard)

    def capture(self, guard: StepGuard, loader: TrainLoader) -> RingEntry:
        """Take a snapshot; in a full ring it replaces the oldest one."""
        if not self._spare:
            if len(self._entries) < self._keep:
                self._spare.append(self._make())
            else:
                self._drop(self._entries[0])
                self._entries[0].trusted = True  # if it was not yet, no other one is: all others are newer
        snapshot = self._spare[-1]
        snapshot.capture(guard, loader)
        self._spare.pop()
        self._entries.append(RingEntry(snapshot))
        return self._entries[-1]

    def on_outcome(self, healthy: bool) -> None:
        """Count a step for all snapshots that are not trusted yet."""
        for each in self._entries:
            if not each.trusted:
                each.healthy = max(0, each.healthy + (1 if healthy else -UNHEALTHY_COSTS))
                each.trusted = each.healthy >= self._trust_after

    def drop_after(self, snapshot: Snapshot) -> None:
        """Drop all snapshots taken after this one: their steps are undone."""
        while self._entries[-1].snapshot is not snapshot:
            self._drop(self._entries[-1])

    def drop_torn(self, guard: StepGuard) -> None:
        """Drop the snapshots that must not be restored, on any rank. A collective."""
        for each in list(self._entries):
            if guard.ranks.any(each.snapshot.torn):
                self._drop(each)

    def forget_unreachable(self, loader: TrainLoader) -> None:
        """Forget the data positions that cannot be restored any more; those of a replaced loader hold its batches."""
        for each in self._entries:
            if each.snapshot.mark is not None and not loader.can_rewind(each.snapshot.mark):
                each.snapshot.mark = None

    def restart_with(self, snapshot: Snapshot) -> None:
        """Drop all snapshots; the only one is then this one, which was taken elsewhere and is trusted."""
        self.clear()
        self._entries.append(RingEntry(snapshot, trusted=True))

    def clear(self) -> None:
        """Drop all snapshots; their memory is used for the next ones."""
        while self._entries:
            self._drop(self._entries[-1])

    def release(self) -> None:
        """Drop all snapshots and free their memory."""
        self._entries, self._spare = [], []

    def _drop(self, entry: RingEntry) -> None:
        self._entries.remove(entry)
        entry.snapshot.clear()
        self._spare.append(entry.snapshot)
