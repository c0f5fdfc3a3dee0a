"""Run on two ranks by test_divided.py: checkpoints of which each rank writes its own part, and what may go wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moving
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from stabletrain import Rollback, SaveCheckpoints, UserError
from stabletrain.runtime.checkpoints import durable
from stabletrain.runtime.snapshots.snapshot import state_bytes


@contextmanager
def messages() -> Iterator[list[str]]:
    """The messages of stabletrain's logger on this rank."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, logger = Keep(), logging.getLogger("stabletrain")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def resumed_at(folder: Path, kind: str, path: Path) -> Any:
    """The step at which a fit resumes, and the messages; or the error."""
    steps: list[int] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            steps.append(trainer.global_step)

    with messages() as said:
        try:
            moving.fit(folder, kind, 2, Look(), SaveCheckpoints(folder / "again", every=None), resume=path)
        except UserError as error:
            return str(error)
    return steps[0], [each for each in said if "damaged" in each]


def damage(folder: Path, kind: str, names: list[str] | None = None) -> dict[Any, Any]:
    """A good checkpoint, then one with a damage of each kind in some files or all: where fits resume, on each rank."""
    checkpoints = folder / "checkpoints"
    moving.fit(folder, kind, 2, SaveCheckpoints(checkpoints, every=2, keep_last=None), max_steps=4)
    found = {}
    good = folder / "good"
    for name in names or sorted(os.listdir(checkpoints / "step-00000004")):
        for how in ("flip", "cut", "lost"):
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(good, ignore_errors=True)
                shutil.copytree(checkpoints, good)
                _damage(good / "step-00000004" / name, how)
            dist.barrier()
            found[name, how] = resumed_at(folder, kind, good)
    return found


def _damage(file: Path, how: str) -> None:
    raw = bytearray(file.read_bytes())
    if how == "lost":
        file.unlink()
        return
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw if how == "flip" else raw[:-1])


def faults(folder: Path, kind: str) -> dict[str, Any]:
    """The results of the quick ones of the functions below, with the same ranks."""
    return {
        "unwritable": [unwritable(folder, kind, background) for background in (True, False)],
        "damage": damage(folder, kind, ["tensors-00001-of-00002.safetensors"]),
        "validated": after_validation(folder),
        "shares": {each: shares(folder, each) for each in ("fsdp2", "zero1")},
    }


def unwritable(folder: Path, kind: str, background: bool) -> dict[str, Any]:
    """Rank 1 cannot write at step 4: which checkpoints there are at the end, and what was said."""
    write = durable.write_file

    def write_file(path: Path, chunks: Any) -> Any:
        if os.environ["RANK"] == "1" and "step-00000004" in str(path):
            write(path, list(chunks)[:1])
            raise OSError(28, "No space left on device")
        return write(path, chunks)

    durable.write_file = write_file
    with messages() as said:
        saver = SaveCheckpoints(folder / f"{background}", every=2, keep_last=None, background=background)
        _, mine = moving.fit(folder, kind, 2, saver, max_steps=6)
    durable.write_file = write
    dist.barrier()
    return {
        "names": sorted(os.listdir(folder / f"{background}")),
        "said": [each for each in said if "could not" in each],
        "reached": mine.global_step,
    }


def shares(folder: Path, kind: str) -> dict[str, Any]:
    """Bytes that this rank writes, copies, and keeps in the snapshot of a rollback; of a net of 4.1 MB with AdamW."""
    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            saver.wait()
            assert saver._saver is not None
            found["copied"] = saver._saver.nbytes
            found["snapshot"] = state_bytes(rollback._guard)

    rollback = Rollback()
    place = folder / f"shares-{kind}"
    saver = SaveCheckpoints(place, every=2, keep_last=None)
    moving.fit(folder, kind, 2, rollback, saver, Look(), max_steps=2, width=26_000)
    files = sorted((place / "step-00000002").glob("tensors-*"))
    found["written"] = [each.stat().st_size for each in files]
    return found


def after_validation(folder: Path) -> list[str]:
    """The names of the optimizer's state in a checkpoint that a validation has saved."""

    class Validated(moving.Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.net(torch.ones(2, 6)).sum())

        def val_dataloader(self) -> Any:
            return DataLoader(torch.zeros(1, 1))

    place = folder / "validated"
    saver = SaveCheckpoints(place, every=None, monitor="loss", keep_last=None)
    moving.fit(folder, "fsdp2", 2, saver, make=Validated, max_steps=4, val_check_interval=2)
    state = json.loads((place / "step-00000002" / "state.json").read_text())
    return [name for name, *_ in state["tensors"] if name.startswith("optimizer_states.")]


def another_model(folder: Path, kind: str) -> list[Any]:
    """The messages of fits of a wider net and of a deeper one."""
    checkpoints = folder / "checkpoints"
    moving.fit(folder, kind, 2, SaveCheckpoints(checkpoints, every=None), max_steps=2)
    found = []
    for options in ({"width": 16}, {"deeper": True}):
        try:
            moving.fit(folder, kind, 2, SaveCheckpoints(folder / "x", every=None), resume=checkpoints, **options)
        except UserError as error:
            found.append(str(error))
    return found


def lightnings_own(folder: Path) -> int:
    """The step that a fit with `SaveCheckpoints` resumes at from a checkpoint of Lightning's sharded form."""
    peer = ModelCheckpoint(folder / "peer", every_n_train_steps=2)
    moving.fit(folder, "fsdp2", 2, peer, max_steps=2)
    path = dist_path(peer.best_model_path)
    at = resumed_at(folder, "fsdp2", path)
    return at[0] if isinstance(at, tuple) else at


def dist_path(path: str) -> Path:
    box = [path]
    dist.broadcast_object_list(box)
    return Path(box[0])
