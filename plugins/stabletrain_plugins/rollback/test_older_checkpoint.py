"""Finding a checkpoint on disk to restore."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint

from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.rollback.older_checkpoint import FoundCheckpoint, find


class InFolder(Checkpoint):
    """A checkpoint callback that only has a folder."""

    def __init__(self, folder: Path) -> None:
        self.dirpath = folder


class Slow(InFolder):
    """Writes in the background; when the write ends, an older checkpoint is deleted."""

    def wait(self) -> None:
        torch.save({"global_step": 20}, self.dirpath / "20.ckpt")
        (self.dirpath / "10.ckpt").unlink()


def test_a_write_in_progress_is_waited_for(tmp_path: Path) -> None:
    """Bug: a checkpoint is chosen that is deleted before it is read."""
    torch.save({"global_step": 10}, tmp_path / "10.ckpt")
    assert find(quiet_trainer(Slow(tmp_path)), before=30) == FoundCheckpoint(str(tmp_path / "20.ckpt"), 20)


@pytest.mark.parametrize(("before", "step"), [(31, 30), (30, 20), (21, 20), (20, 10), (10, None)])
def test_the_newest_good_one_from_before_a_step(tmp_path: Path, before: int, step: int | None) -> None:
    """Bug: a checkpoint of the step itself, with the damage in it; or a damaged file ends the search."""
    for number in (10, 20, 30, 40):
        path = tmp_path / f"{number}.ckpt"
        torch.save({"global_step": number}, path)
        os.utime(path, (number, number))
    (tmp_path / "40.ckpt").write_bytes(b"damaged")
    expected = None if step is None else FoundCheckpoint(str(tmp_path / f"{step}.ckpt"), step)
    assert find(quiet_trainer(InFolder(tmp_path)), before) == expected
