"""Snapshots in a folder instead of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stabletrain.errors import UserError
from stabletrain_plugins.rollback.memory import new_snapshot
from stabletrain_plugins.rollback.rollback_rule import RollbackRule


def test_snapshots_on_disk_leave_no_files(tmp_path: Path) -> None:
    """Bug: files that stay behind, and bytes that differ; a full disk without advice."""
    tensors = [torch.randn(600_000), torch.randn(3), torch.randn(1024, 1024).to(torch.bfloat16)]
    buffers = new_snapshot(RollbackRule(spill=str(tmp_path / "spill")))._buffers
    buffers.copy_in(tensors)
    assert list((tmp_path / "spill").iterdir()) == []
    expected = [each.clone() for each in tensors]
    for each in tensors:
        each.zero_()
    buffers.copy_back(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    (tmp_path / "file").write_text("")
    message = r"^rollback: a snapshot cannot be stored in .* \(\d+ MiB needed\); .*plugins\.spike\.spill.*spike\.keep"
    with pytest.raises(UserError, match=message):
        new_snapshot(RollbackRule(spill=str(tmp_path / "file")))._buffers.copy_in(tensors)
