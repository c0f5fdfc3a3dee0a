"""Snapshots that are copied beside the device's other work, with streams that copy as late as a device may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fits
import pytest
import torch
from fits import HEALTHY, Net, assert_same, batches, everything
from going_back import GoBack
from torch import Tensor

import stabletrain as st
from stabletrain.runtime.snapshots import streams
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers
from stabletrain.runtime.snapshots.overlap import Overlap
from stabletrain.runtime.snapshots.snapshot import Snapshot


class LateStreams:
    """Copies only when something waits for it."""

    def __init__(self) -> None:
        self.queued: list[Callable[[], None]] = []
        self.done = self.late = 0

    def beside(self, work: Callable[[], None]) -> int:
        self.queued.append(work)
        return len(self.queued)

    def hold(self, end: int) -> None:
        for work in self.queued[self.done : end]:
            work()
        self.done = max(self.done, end)

    wait = hold


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateStreams:
    made = LateStreams()
    monkeypatch.setattr(streams, "streams_of", lambda device: made)
    return made


class Normalizing(Net):
    """Changes a weight in forward, at every step or at one, without or with torch's counter of changes."""

    def __init__(self, at: int | None, counted: bool) -> None:
        super().__init__("adamw-fused")
        self.at, self.counted, self.steps = at, counted, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        if self.at in (None, self.steps):
            weight: Tensor = self.net[0].weight
            (weight.detach() if self.counted else weight.data).mul_(1.5)
        return super().training_step(batch, batch_idx)


def train(net: Net, go_back: GoBack) -> dict[str, Tensor]:
    trainer = fits.fit(net, batches(*[HEALTHY] * 24), go_back, st.Guard(mode="device"), st.ClipNorm(1.0))
    assert go_back.went_back == len(go_back.at)
    return everything(trainer)


def overlapping(*at: int) -> GoBack:
    overlap = Overlap()
    return GoBack(2, at, make=lambda: Snapshot(overlap=overlap))


def test_a_copy_that_ends_just_before_the_update_is_exact(late: LateStreams) -> None:
    """Bugs: the update overwrites weights that are not copied yet; forward changes statistics before their copy.

    The network has both, and a step with an empty optimizer state is among those that are gone back to.
    """
    with_overlap = train(Net("adamw-fused"), overlapping(13, 19))
    assert len(late.queued) >= 20, "two for each snapshot"
    assert_same(with_overlap, train(Net("adamw-fused"), GoBack(2, (13, 19))))


def test_weights_are_still_being_copied_when_the_capture_returns(late: LateStreams) -> None:
    """Bug: everything is copied at once, and the device stands still. The first three snapshots are, to be checked."""
    waiting = []

    class Watch(GoBack):
        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            if self.batches % 2 == 0:
                copying = self.snapshots[-1]._buffers._copying
                assert copying is not None
                waiting.append(len(copying.sources))

    overlap = Overlap()
    train(Net("adamw-fused"), Watch(2, (), make=lambda: Snapshot(overlap=overlap)))
    parameters = 6
    everything_of_adamw = parameters * 4  # weight, two moments and the count of steps
    assert waiting == [0, 0, 0, *[everything_of_adamw] * 8, 0], (
        "not of the last batch, after which hooks may change them"
    )


@pytest.mark.parametrize("counted", [True, False])
def test_weights_that_forward_changes_are_never_copied_beside_it(late: LateStreams, counted: bool) -> None:
    """Bug: a layer that normalizes its weights in forward makes a snapshot of two states."""
    mine = train(Normalizing(None, counted), overlapping(13, 19))
    assert_same(mine, train(Normalizing(None, counted), GoBack(2, (13, 19))))


def test_a_snapshot_during_whose_copy_a_weight_changed_is_marked(
    late: LateStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a change at one step, long after the first snapshots, is restored half."""
    go_back = overlapping()
    snapshots = []

    def make() -> Snapshot:
        snapshots.append(Snapshot(overlap=overlap))
        return snapshots[-1]

    overlap = Overlap()
    go_back.make = make
    train(Normalizing(11, True), go_back)
    assert [each.torn for each in snapshots] == [i == 4 for i in range(len(snapshots))]
    assert "code other than the optimizer" in caplog.text


def test_an_update_without_a_hook_is_noticed(late: LateStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a step that calls no hooks overwrites weights that are being copied, and nobody knows."""
    monkeypatch.setattr(torch.optim.Optimizer, "register_step_pre_hook", lambda *_: None)
    snapshots = []

    def make() -> Snapshot:
        snapshots.append(Snapshot(overlap=overlap))
        return snapshots[-1]

    overlap, go_back = Overlap(), overlapping()
    go_back.make = make
    train(Net("adamw-fused"), go_back)
    assert len(snapshots) == 12
    assert not any(each.torn for each in snapshots)
    assert not any(each._buffers._copying and each._buffers._copying.sources for each in snapshots)


def test_tensors_are_released_and_read_only_when_complete(late: LateStreams) -> None:
    """Bugs: a reader of the copies gets what was there before; a second copy into buffers that are still written."""
    steady, other = torch.ones(3), torch.ones(2)
    buffers = SnapshotBuffers()
    buffers.copy_in([steady, other], {0})
    other.zero_()  # as the next forward may
    assert buffers.tensors[0].tolist() == [1, 1, 1]
    assert buffers.tensors[1].tolist() == [1, 1]
    buffers.copy_in([steady, other], {0})
    buffers.let_change()
    steady.zero_()
    buffers.copy_in([steady.add_(5), other], {0})
    assert buffers.tensors[0].tolist() == [5, 5, 5]
