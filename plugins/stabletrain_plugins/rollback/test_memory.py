"""Snapshots in a folder instead of memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from stabletrain.errors import UserError
from stabletrain.runtime.snapshots.overlap import Overlap
from stabletrain_plugins.rollback.memory import MemoryPlan, forget_peak, new_snapshot
from stabletrain_plugins.rollback.rollback_rule import RollbackRule


def test_spill_is_the_folder_of_the_snapshots(tmp_path: Path) -> None:
    """Bugs: ``spill`` has no effect, and snapshots stay in memory; a full disk whose message names no argument."""
    buffers = new_snapshot(RollbackRule(spill=str(tmp_path / "spill")))._buffers
    buffers.copy_in([torch.zeros(600_000)])
    assert list((tmp_path / "spill").iterdir()) == []
    (tmp_path / "file").write_text("")
    message = r"^rollback: a snapshot cannot be stored in .* \(\d+ MiB needed\); .*plugins\.spike\.spill.*spike\.keep"
    with pytest.raises(UserError, match=message):
        new_snapshot(RollbackRule(spill=str(tmp_path / "file")))._buffers.copy_in([torch.zeros(600_000)])


def test_snapshots_without_room_on_the_device_are_refused_with_the_bytes() -> None:
    """Bugs: batches, which are in main memory, count as device memory; a run that ends by CUDA's out of memory."""
    plan = MemoryPlan(copies=3 << 30, keep=3, taped=50 << 20, batches=150, spill=None)
    device = torch.device("cuda", 0)
    assert plan.device_problem(device, 3 << 30) is None
    assert plan.problem(None, 60 << 20, on_device=True) is None
    message = plan.device_problem(device, 2 << 30) or ""
    assert all(part in message for part in ("3 snapshots of 1", "cuda:0", "2", "plugins.spike.where=host")), message
    assert "150 batches" in (plan.problem(None, 40 << 20, on_device=True) or "")
    assert "memory" in (plan.problem("1GB", math.inf, on_device=True) or ""), "a limit of the user's is for both"


def test_the_peak_of_an_earlier_fit_is_not_this_one_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the second fit of a process is refused, since the snapshots of the first were part of its peak."""
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    device = torch.device("cuda", 0)
    forget_peak(RollbackRule(), device)
    forget_peak(RollbackRule(where="device"), torch.device("cpu"))
    assert not reset
    forget_peak(RollbackRule(where="device"), device)
    assert reset == [device]


def test_snapshots_on_the_device_are_complete_at_once() -> None:
    """Bug: such a snapshot is taken for one that is still copied: it is dropped when a hook changes weights."""
    assert new_snapshot(RollbackRule(where="device"), Overlap())._overlap is None
    assert new_snapshot(RollbackRule(), Overlap())._overlap is not None
