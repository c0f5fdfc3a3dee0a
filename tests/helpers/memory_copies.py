"""Run on several ranks by test_memory_copies.py: trainings on "nodes" of which each has a memory folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import moving
import torch
from divided_checkpoints import messages
from lightning.pytorch import Callback

from stabletrain import ClipZScore, ResumeExactly, SaveCheckpoints, SkipNonFinite
from stabletrain.runtime.checkpoints import durable


class Dies(Callback):
    """Kills one rank before a step, once its copies are complete; with the memory of its node, if that is lost too."""

    def __init__(self, saver: SaveCheckpoints, at: int, rank: int, lost: Path | None = None) -> None:
        self.saver, self.at, self.rank, self.lost = saver, at, rank, lost

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            self.saver.wait()  # so that there is a checkpoint on disk, by which a copy is known to be of this run
            assert self.saver._copies is not None
            self.saver._copies.wait()
            trainer.strategy.barrier()
            if trainer.global_rank == self.rank:
                if self.lost is not None:
                    shutil.rmtree(self.lost)
                os.kill(os.getpid(), signal.SIGKILL)


class Start(Callback):
    """Keeps the step at which a fit starts."""

    step = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.step = trainer.global_step


def as_nodes(nodes: int) -> int:
    """Let this rank be one of a node's, as torchrun numbers them; the number of its node."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    per_node = size // nodes
    os.environ |= {
        "GROUP_RANK": str(rank // per_node),
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
    }
    return rank // per_node


def train(
    folder: Path,
    kind: str,
    nodes: int,
    dies: tuple[int, int, bool] | None = None,
    restarted: bool = False,
    memory: dict[str, Any] | None = None,
    resume: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on some nodes; the results, the step at which the fit started, what was said, and what memory holds.

    Args:
        folder: of the run; the memory of node n is ``folder/memory-n``.
        kind: of `moving`.
        nodes: that the ranks are divided among.
        dies: before which step which rank is killed, and whether the memory of its node is lost.
        restarted: whether torchrun has restarted the ranks.
        memory: the argument of `SaveCheckpoints`, without the folder; None: no copies.
        resume: ``ckpt_path``.
        options: of `moving.fit`.
    """
    node = as_nodes(nodes)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(restarted))
    place = folder / f"memory-{node}"
    if memory is not None:
        memory = {"folder": str(place), **memory}
    saver, start = SaveCheckpoints(folder / "checkpoints", every=None, memory=memory), Start()
    plugins: list[Callback] = [ResumeExactly(), ClipZScore(), SkipNonFinite(), start, saver]
    if dies is not None:
        plugins.append(Dies(saver, dies[0], dies[1], place if dies[2] else None))
    options = {"devices": int(os.environ["LOCAL_WORLD_SIZE"]), "num_nodes": nodes, **options}
    with messages() as said:
        module, mine = moving.fit(folder, kind, int(os.environ["WORLD_SIZE"]), *plugins, resume=resume, **options)
    left = sorted(each.name for each in place.rglob("*")) if place.exists() else []
    return {**moving._results(module, mine), "start": start.step, "said": said, "left": left}


def call(folder: Path, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several trainings with the same ranks, one after the other; what is known of a killed one is lost with it."""
    found = []
    for options in steps:
        found.append(train(folder / options.pop("run"), **options))
        torch.save(found, folder / f"found-{os.environ['RANK']}.pt")
    return found


def full(folder: Path) -> dict[str, Any]:
    """The memory of node 1 is full from the second copy on, and that of node 0 at the third while it receives."""
    as_nodes(2)
    write, copies = durable.write_file, 0

    def write_file(path: Path, chunks: Any) -> Any:
        nonlocal copies
        if "memory-1" in str(path) and path.name.startswith("tensors"):
            copies += 1
            if copies > 1:
                write(path, list(chunks)[:1])
                raise OSError(28, "No space left on device")
        return write(path, chunks)

    durable.write_file = write_file
    try:
        return train(folder, "fsdp2", 2, memory={"every": 2})
    finally:
        durable.write_file = write
