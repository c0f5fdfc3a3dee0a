"""A run that is stopped within an epoch and resumed by another number of ranks; which samples each rank sees."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from fits import SaveAfter, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from stabletrain import ResumeExactly


class Numbers(torch.utils.data.Dataset[int]):
    """Sample i is i."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        return index


class Net(LightningModule):
    """Notes the samples of every batch, by epoch.

    Args:
        samples: of the dataset.
        batch: samples in a batch of one rank.
        kind: ``"shuffled"``, ``"generator"`` (with a generator of its own), ``"workers"``; ``"in order"``: dealt out by
            a sampler that the module makes.
    """

    def __init__(self, samples: int, batch: int, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(1, 2)
        self.samples, self.batch, self.kind = samples, batch, kind
        self.seen: dict[int, list[list[int]]] = {}

    def configure_model(self) -> None:
        """Cut the layer over the ranks, with tensor parallelism."""
        if self.device_mesh is not None and not isinstance(self.net.weight, DTensor):
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], ColwiseParallel())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch.tolist())
        torch.rand(3)
        return self.net(batch[:, None].float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6, momentum=0.5)

    def train_dataloader(self) -> DataLoader[int]:
        data, size = Numbers(self.samples), self.trainer.world_size
        if self.kind == "in order":
            dealt = DistributedSampler(data, size, self.global_rank, shuffle=False) if size > 1 else None
            return DataLoader(data, batch_size=self.batch, sampler=dealt)
        generator = torch.Generator().manual_seed(7) if self.kind == "generator" else None
        workers: dict[str, Any] = (
            {"num_workers": 1, "multiprocessing_context": "fork"} if self.kind == "workers" else {}
        )
        return DataLoader(data, self.batch, shuffle=True, generator=generator, **workers)


def _strategy(kind: str) -> Strategy:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(1, 2, save_distributed_checkpoint=False, process_group_backend="gloo")


def train(
    folder: Path,
    size: int,
    samples: int,
    batch: int,
    kind: str,
    resume: Path | None,
    save: dict[int, Path],
    trained_by: str = "ddp",
) -> tuple[dict[int, list[list[int]]], list[str]]:
    """Train two epochs; what this rank has seen, and the warnings of ResumeExactly.

    Args:
        folder: of the run.
        size: number of ranks.
        samples, batch, kind: see `Net`.
        resume: checkpoint to resume from; None: from scratch.
        save: where to save after which batch of the run.
        trained_by: kind of strategy, of several ranks; of ``"tp"`` all ranks read the same batches.
    """
    torch.manual_seed(3)
    more: dict[str, Any] = {"strategy": _strategy(trained_by)} if size > 1 else {}
    saves = [SaveAfter(number, path) for number, path in save.items()]
    mine = trainer(ResumeExactly(), *saves, default_root_dir=folder, devices=size, max_epochs=2, **more)
    module = Net(samples, batch, kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine.fit(module, ckpt_path=resume)
    return module.seen, [str(each.message) for each in caught if "resume_exactly" in str(each.message)]


def train_all(folder: Path, size: int, cases: list[tuple[Any, ...]]) -> list[Any]:
    """`train` for several cases, in one process per rank."""
    return [train(folder, size, *case) for case in cases]
