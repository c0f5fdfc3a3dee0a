"""Trainings of a small GPT on one process and on several that share its layers, for tests that compare them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from fits import Recorder, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from stabletrain import ClipNorm, FSDP2TensorParallelStrategy, TensorParallelStrategy, default_callbacks
from stabletrain.workloads import CharGPT

SMALL = {"layers": 2, "heads": 4, "width": 32, "context": 16, "vocab_size": 40, "lr": 1e-2, "sample_length": 0}
BATCHES, ROWS = 20, 4


class Recorded(CharGPT):
    """Keeps the loss of each micro-batch; ``nan_at``: (batch, rank) at which the loss is NaN."""

    def __init__(self, nan_at: tuple[int, int] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(**{**SMALL, **options})
        self.losses: list[float] = []
        self.nan_at = nan_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if (batch_idx, self.global_rank) == self.nan_at:
            loss = loss * torch.nan
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.losses.append(float(outputs["loss"]))


def batches(count: int = BATCHES, rows: int = ROWS) -> Tensor:
    return torch.randint(0, 40, (count * rows, 17), generator=torch.Generator().manual_seed(1))


def strategy(kind: str, **options: Any) -> Strategy:
    made = FSDP2TensorParallelStrategy if kind == "fsdp2_tp" else TensorParallelStrategy
    return made(process_group_backend="gloo", **options)


def fit(
    folder: Path,
    module: LightningModule,
    *callbacks: Callback,
    kind: Strategy | None = None,
    devices: int = 1,
    data: Tensor | None = None,
    rows: int = ROWS,
    ckpt_path: str | None = None,
    **options: Any,
) -> Trainer:
    if kind is not None:
        options |= {"strategy": kind, "devices": devices}
    mine = trainer(*callbacks, default_root_dir=folder, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        mine.fit(module, DataLoader(batches() if data is None else data, rows), ckpt_path=ckpt_path)
    return mine


def whole_weights(module: LightningModule) -> dict[str, Tensor]:
    whole = {key: p.full_tensor() if isinstance(p, DTensor) else p for key, p in module.named_parameters()}
    return {key: weight.detach().clone() for key, weight in whole.items()}



def stack(max_norm: float = 0.4) -> list[Callback]:
    """The default stack, with a fixed clip norm that most steps exceed."""
    return default_callbacks(clip=ClipNorm(max_norm))


def results(module: Recorded, recorder: Any, mine: Trainer) -> dict[str, Any]:
    return {
        "losses": module.losses,
        "outcomes": [tuple(each) for each in recorder.state],
        "weights": whole_weights(module),
        "global_step": mine.global_step,
    }


def train(
    folder: Path, kind: str | None, devices: int, options: dict[str, Any], *more: Callback, **others: Any
) -> dict[str, Any]:
    """Train a `Recorded` with the default stack; on one process for no kind."""
    recorder, module = Recorder(), Recorded(**options)
    chosen = None if kind is None else strategy(kind, **others.pop("strategy_options", {}))
    mine = fit(folder, module, *stack(), recorder, *more, kind=chosen, devices=devices, **others)
    return results(module, recorder, mine)


# ---- called on each rank --------------------------------------------------------------------------------------------


def train_on_ranks(folder: Path, kind: str, devices: int, options: dict[str, Any]) -> dict[str, Any]:
    return train(folder, kind, devices, options)
