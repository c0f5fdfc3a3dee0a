"""Run on several ranks by test_memory_copies.py: trainings on "nodes" of which each has a memory folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import moving
from divided_checkpoints import messages
from lightning.pytorch import Callback
from moving import _results

from stabletrain import ClipZScore, ResumeExactly, SaveCheckpoints, SkipNonFinite


class Dies(Callback):
    """Kills one rank before a step, once its copies are complete; with the memory of its node, if that is lost too."""

    def __init__(self, saver: SaveCheckpoints, at: int, rank: int, lost: Path | None = None) -> None:
        self.saver, self.at, self.rank, self.lost = saver, at, rank, lost

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at and trainer.global_rank == self.rank:
            assert self.saver._copies is not None
            self.saver._copies.wait()
            if self.lost is not None:
                shutil.rmtree(self.lost)
            os.kill(os.getpid(), signal.SIGKILL)


class Start(Callback):
    """Keeps the step at which a fit starts."""

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
    saved_every: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on some nodes; the results, the step at which the fit started, and what was said.

    Args:
        folder: of the run; the memory of node n is ``folder/memory-n``.
        kind: of `moving`.
        nodes: that the ranks are divided among.
        dies: before which step which rank is killed, and whether the memory of its node is lost.
        restarted: whether torchrun has restarted the ranks.
        memory: the argument of `SaveCheckpoints`, without the folder; None: no copies.
        resume: ``ckpt_path``.
        saved_every: steps between checkpoints on disk; None: at the end only.
        options: of `moving.fit`.
    """
    node = as_nodes(nodes)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(restarted))
    place = folder / f"memory-{node}"
    if memory is not None:
        memory = {"folder": str(place), **memory}
    saver, start = SaveCheckpoints(folder / "checkpoints", every=saved_every, memory=memory), Start()
    plugins: list[Callback] = [ResumeExactly(), ClipZScore(), SkipNonFinite(), start, saver]
    if dies is not None:
        plugins.append(Dies(saver, dies[0], dies[1], place if dies[2] else None))
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    with messages() as said:
        results = _results(*moving.fit(
            folder, kind, int(os.environ["WORLD_SIZE"]), *plugins, resume=resume,
            **{"devices": per_node, "num_nodes": nodes, **options},
        ))  # fmt: skip
    left = sorted(str(each.relative_to(place)) for each in place.rglob("*")) if place.exists() else []
    return {**results, "start": start.step, "said": said, "left": left}


def call(folder: Path, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """`train`, for `on_ranks`, which passes no keyword arguments."""
    return train(folder, *arguments, **options)
