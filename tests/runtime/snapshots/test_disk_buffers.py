"""Snapshot buffers in files: the same bytes as in memory, no file left, and a message where the disk refuses."""

from pathlib import Path

import pytest
import torch

from stabletrain import UserError
from stabletrain.runtime.snapshots.disk_buffers import DiskBuffers


def test_buffers_on_disk_leave_nothing_behind(tmp_path: Path) -> None:
    """Bugs: files that stay when the process ends; bytes that differ; a traceback of the file system's."""
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
    with pytest.raises(UserError, match=r"^mine: a snapshot cannot be stored in .*file.*; choose another$"):
        DiskBuffers(tmp_path / "file", "mine", "choose another").copy_in(tensors)
