"""Trainings of one rank by DistributedDataParallel or FSDP2 on a device, for processes that others start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fits import HEALTHY, NAN_LOSS, SaveAfter, batches, everything, loader
from going_back import GoBack
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from places import Place, Trained, Where

import stabletrain as st
from stabletrain.launch.cause import cause_of
from stabletrain.runtime.snapshots.overlap import Overlap
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain.testing.checks.equality import differences

FAULTS = [HEALTHY] * 3 + [NAN_LOSS] + [HEALTHY] * 12


def strategy_of(name: str, place: Place) -> Any:
    if name == "ddp":
        return DDPStrategy(process_group_backend=place.backend)
    return st.FSDP2Strategy(units=["Linear"], process_group_backend=place.backend)


def train(folder: Path, name: str, place: Place) -> list[str]:
    """Train in all ways, and return what differs from the straight run with the other batches."""
    torch.use_deterministic_algorithms(place.on_cuda)
    items = batches(*FAULTS)
    never_seen = [item for item in items if item[1] == HEALTHY]

    def ends(some: Any, *callbacks: Any, **options: Any) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        plugins = [st.ClipZScore(), st.SkipNonFinite(), place.guard(fused=True), *callbacks]
        options |= {"strategy": strategy_of(name, place), "use_distributed_sampler": False}  # which would shuffle
        trainer = place.fit(Trained("adamw-fused", norm=False), some, *plugins, **options)
        return everything(trainer)

    overlap, path = Overlap(), folder / "at.ckpt"
    where, go_back = Where(), GoBack(3, (10, 18), make=lambda: Snapshot(overlap=overlap))
    straight = ends(never_seen, where)
    assert where.on_device
    found = {
        "dropped": ends(items, SaveAfter(7, path)),
        "went back": ends(items, go_back),
        "resumed": ends(loader(items[8:], sized=False), ckpt_path=path),
    }
    assert go_back.went_back == 2
    return [text for way, end in found.items() for text in differences(end, straight, way)]


def on_the_first_gpu(folder: Path) -> str:
    """Call a collective of NCCL on the first GPU, whatever this rank is; what its error means."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    try:
        dist.all_reduce(torch.ones(1, device="cuda"))
    except Exception as error:
        return cause_of(error, started=False).result.message
    return "no error"
