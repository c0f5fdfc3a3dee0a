"""The last few snapshots of a run, and which of them deserve trust."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.snapshots.snapshot import Snapshot, state_bytes


class RingEntry:
    """A snapshot in the ring.

    Args:
        snapshot: the state.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.healthy = 0
        """Healthy steps in a row since, up to the last one; no longer counted once it is trusted."""
        self.trusted = False


class SnapshotRing:
    """Snapshots in the order of the run; the newest is on trial until it has stayed healthy for long enough.

    Args:
        keep: how many, >= 2: one on trial, and those to go back to.
        trust_after: healthy steps in a row, at once or after a short trouble, that make a snapshot trusted.
        make: makes an empty snapshot.
    """

    def __init__(self, keep: int, trust_after: int, make: Callable[[], Snapshot]) -> None:
        self._keep, self._trust_after, self._make = keep, trust_after, make
        self._kept: list[RingEntry] = []
        self._spare: list[Snapshot] = []

    def __iter__(self) -> Iterator[RingEntry]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def newest(self) -> RingEntry | None:
        """The snapshot taken last."""
        return self._kept[-1] if self._kept else None

    @property
    def oldest(self) -> RingEntry | None:
        """The snapshot taken first."""
        return self._kept[0] if self._kept else None

    @property
    def nbytes(self) -> int:
        """Memory of all copies, bytes; of empty places too."""
        return sum(each.nbytes for each in (*(kept.snapshot for kept in self._kept), *self._spare))

    def bytes_needed(self, guard: StepGuard) -> int:
        """Memory that the full ring will take on this rank, bytes."""
        return self._keep * state_bytes(guard)

    def prepare(self, guard: StepGuard) -> None:
        """Get all memory now: later, a snapshot costs its copy alone."""
        while len(self._kept) + len(self._spare) < self._keep:
            self._spare.append(self._make())
        for snapshot in self._spare:
            snapshot.prepare(guard)

    def take(self, guard: StepGuard, loader: TrainLoader) -> RingEntry:
        """Take a snapshot; it replaces the newest one if that did not prove itself, else the oldest."""
        if not self._spare:
            if len(self._kept) < self._keep:
                self._spare.append(self._make())
            else:
                self._drop(self._kept[-1] if not self._kept[-1].trusted else self._kept[0])
        snapshot = self._spare[-1]
        snapshot.capture(guard, loader)
        self._spare.pop()
        self._kept.append(RingEntry(snapshot))
        return self._kept[-1]

    def outcome(self, healthy: bool) -> None:
        """A step is over: those on trial gain trust, or begin anew."""
        for each in reversed(self._kept):
            if each.trusted:
                continue
            each.healthy = each.healthy + 1 if healthy else 0
            each.trusted = each.healthy >= self._trust_after

    def trusted(self, before: int | None = None) -> RingEntry | None:
        """The newest snapshot to go back to.

        Args:
            before: only those of fewer applied steps; None: any.
        """
        for each in reversed(self._kept):
            if each.trusted and (before is None or each.snapshot.applied < before):
                return each
        return None

    def drop_after(self, kept: RingEntry) -> None:
        """Forget what came later than a snapshot: it will not happen."""
        while self._kept[-1] is not kept:
            self._drop(self._kept[-1])

    def drop_out_of_reach(self, loader: TrainLoader) -> None:
        """Forget those whose place in the data cannot be gone back to: the train loader was made anew since."""
        for each in list(self._kept):
            if each.snapshot.mark is not None and not loader.can_rewind(each.snapshot.mark):
                self._drop(each)

    def begin_with(self, snapshot: Snapshot) -> None:
        """Forget all others, and trust this one, which was taken elsewhere."""
        self.clear()
        kept = RingEntry(snapshot)
        kept.trusted = True
        self._kept.append(kept)

    def clear(self) -> None:
        """Forget all snapshots; their memory is kept."""
        while self._kept:
            self._drop(self._kept[-1])

    def release(self) -> None:
        """Give everything back."""
        self._kept, self._spare = [], []

    def _drop(self, kept: RingEntry) -> None:
        self._kept.remove(kept)
        kept.snapshot.clear()
        self._spare.append(kept.snapshot)
