"""Trains on a device and kills itself: ``python killed_on_device.py FOLDER DEVICE PRECISION OPTIMIZER STEPS``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from fits import HEALTHY, NAN_LOSS, batches
from lightning.pytorch import Callback, Trainer, seed_everything
from places import Place, Trained, Where

import stabletrain as st

BATCHES = batches(*(NAN_LOSS if i in (3, 11) else HEALTHY for i in range(24)))


class Kill(Callback):
    """Kills this process after some batches, without a chance to clean up.

    Args:
        after: batches.
        saver: waits for its last write, so that there is something to resume from.
    """

    def __init__(self, after: int, saver: st.SaveCheckpoints) -> None:
        self.after, self.saver, self.batches = after, saver, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1
        if self.batches == self.after:
            self.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    folder: Path, place: Place, precision: str, optimizer: str, kill_after: int = 0, resume: bool = False
) -> tuple[Trainer, Where]:
    """Train with dropout and two bad batches, and a checkpoint after each fifth step.

    Args:
        folder: of the checkpoints.
        place: the device.
        precision: as the Trainer's.
        optimizer: of `places`.
        kill_after: batches after which this process is killed; 0: never.
        resume: continue from the newest checkpoint.
    """
    torch.use_deterministic_algorithms(place.on_cuda)
    seed_everything(7 if resume else 0, verbose=False)  # a resumed run takes its random numbers from the checkpoint
    saver, where = st.SaveCheckpoints(folder, every=5), Where()
    plugins = [st.SkipNonFinite(), st.ClipZScore(), st.ResumeExactly(), saver, where]
    guard = place.guard(optimizer.endswith("fused"), precision)
    killer = [Kill(kill_after, saver)] if kill_after else []
    path = saver.last if resume else None
    assert (path is not None) == resume
    trainer = place.fit(
        Trained(optimizer, dropout=0.3),
        BATCHES,
        *plugins,
        guard,
        *killer,
        precision=precision,
        ckpt_path=path,
        default_root_dir=folder,
    )
    return trainer, where


if __name__ == "__main__":
    train(Path(sys.argv[1]), Place(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
