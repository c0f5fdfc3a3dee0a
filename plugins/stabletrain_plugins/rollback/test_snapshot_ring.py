"""Which snapshot is gone back to, what counts as damage, and what a log of interventions says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stabletrain.errors import UserError
from stabletrain.runtime.snapshots.disk_buffers import DiskBuffers
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain_plugins.rollback.interventions import Fingerprint, Intervention, InterventionLog, read
from stabletrain_plugins.rollback.snapshot_ring import SnapshotRing

MINE = Fingerprint("model", "recipe", 1)


class Fake(Snapshot):
    """Takes only its number."""

    def capture(self, guard: Any, loader: Any) -> None:
        self.step = self.applied = guard


def take(ring: SnapshotRing, step: int, *healthy: bool) -> None:
    ring.take(step, None)  # type: ignore[arg-type]
    for each in healthy:
        ring.outcome(each)


def steps(ring: SnapshotRing) -> list[int]:
    return [each.snapshot.step for each in ring]


def test_only_health_makes_trust() -> None:
    # catches a snapshot of the beginning of trouble that is gone back to
    ring = SnapshotRing(3, 3, Fake)
    take(ring, 1, True, True)
    assert ring.trusted() is None
    ring.outcome(False)
    ring.outcome(True)
    ring.outcome(True)
    assert ring.trusted() is None
    ring.outcome(True)
    assert ring.trusted() is ring.newest
    ring.outcome(False)
    assert ring.trusted() is ring.newest, "what was proved stays proved"


def test_trial_never_costs_a_trusted_snapshot() -> None:
    # catches a ring whose last good snapshot is overwritten by ones that never prove themselves
    ring = SnapshotRing(2, 2, Fake)
    take(ring, 1, True, True)
    for step in (2, 3, 4):
        take(ring, step, True, False)
    assert steps(ring) == [1, 4]
    take(ring, 5, True, True)
    take(ring, 6)
    assert steps(ring) == [5, 6]


def test_further_back_and_forgetting_what_came_later() -> None:
    # catches snapshots of an undone future
    ring = SnapshotRing(3, 1, Fake)
    for step in (1, 2, 3):
        take(ring, step, True)
    assert ring.trusted(before=3).snapshot.step == 2  # type: ignore[union-attr]
    assert ring.trusted(before=1) is None
    ring.drop_after(ring.trusted(before=3))  # type: ignore[arg-type]
    assert steps(ring) == [1, 2]
    take(ring, 9)
    assert steps(ring) == [1, 2, 9]


def made(step: int) -> Intervention:
    return Intervention(step, step - 5, None, (step, step - 5), (("samples", 1, "b"),), (), 3, "restore", "p", "c")


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    # catches an intervention that changes on its way through the file
    log = InterventionLog(tmp_path / "interventions.jsonl", MINE)
    log.resumed(3)
    assert not (tmp_path / "interventions.jsonl").exists(), "a run without interventions has no log"
    log.append(made(10))
    log.append(made(20))
    assert read(tmp_path, MINE) == [made(10), made(20)]


def test_what_a_restart_undid_is_left_out(tmp_path: Path) -> None:
    # catches a rollback that is made twice because the run was killed after it, and resumed from before it
    log = InterventionLog(tmp_path / "interventions.jsonl", MINE)
    log.append(made(10))
    log.append(made(20))
    log.resumed(15)
    assert read(tmp_path, MINE) == [made(10)]
    log.append(made(21))
    assert read(tmp_path, MINE) == [made(10), made(21)]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    # catches a log that a kill has made useless
    path = tmp_path / "interventions.jsonl"
    log = InterventionLog(path, MINE)
    log.append(made(10))
    path.write_text(path.read_text() + '{"action": "rollb')
    assert read(path, MINE) == [made(10)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Fingerprint("other", "recipe", 1), "another model or optimizer"),
        (Fingerprint("model", "other", 1), "another recipe"),
        (Fingerprint("model", "recipe", 2), "with 1 processes, and this one has 2"),
    ],
)
def test_another_runs_log_is_refused(tmp_path: Path, other: Fingerprint, message: str) -> None:
    # catches interventions made where they mean nothing
    InterventionLog(tmp_path / "interventions.jsonl", MINE).append(made(10))
    with pytest.raises(UserError, match=message):
        read(tmp_path, other)


def test_a_disk_that_refuses_ends_nothing(tmp_path: Path) -> None:
    # catches a run that dies of its own log
    (tmp_path / "file").write_text("")
    log = InterventionLog(tmp_path / "file" / "interventions.jsonl", MINE)
    log.append(made(10))
    log.append(made(20))
    (tmp_path / "file").unlink()
    log.append(made(30))
    assert [each.step for each in read(tmp_path / "file", MINE)] == [10, 20, 30], "written once the disk takes them"


def test_buffers_on_disk_leave_nothing_behind(tmp_path: Path) -> None:
    # catches files that stay, and bytes that differ
    tensors = [torch.randn(600_000), torch.randn(3), torch.randn(1024, 1024).to(torch.bfloat16)]
    buffers = DiskBuffers(tmp_path / "spill")
    buffers.copy_in(tensors)
    assert list((tmp_path / "spill").iterdir()) == []
    wanted = [each.clone() for each in tensors]
    for each in tensors:
        each.zero_()
    buffers.copy_back(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^rollback: .* cannot be kept in .*plugins\.spike\.spill"):
        DiskBuffers(tmp_path / "file", "rollback", "config key plugins.spike.spill").copy_in(tensors)
