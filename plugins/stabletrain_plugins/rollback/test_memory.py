"""Snapshots in a folder instead of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stabletrain.errors import UserError
from stabletrain_plugins.rollback.memory import new_snapshot
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
