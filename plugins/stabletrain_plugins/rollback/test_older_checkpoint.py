"""Finding a checkpoint on disk to go back to."""

from pathlib import Path

import torch
from lightning.pytorch.callbacks import Checkpoint

from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.rollback.older_checkpoint import find


class Slow(Checkpoint):
    """Writes behind training's back; when a write ends, an older checkpoint is deleted."""

    def __init__(self, folder: Path) -> None:
        self.dirpath = folder

    def wait(self) -> None:
        torch.save({"global_step": 20}, self.dirpath / "20.ckpt")
        (self.dirpath / "10.ckpt").unlink()


def test_what_is_being_written_is_waited_for(tmp_path: Path) -> None:
    # catches the choice of a checkpoint that is deleted before it is read
    torch.save({"global_step": 10}, tmp_path / "10.ckpt")
    assert find(quiet_trainer(Slow(tmp_path)), before=30) == str(tmp_path / "20.ckpt")
