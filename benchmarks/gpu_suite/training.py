"""The GPT, its data and its trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from gpu_suite.place import Place
from stabletrain.workloads.gpt import GPT


class Tokens(IterableDataset[Tensor]):
    """Batches of random tokens, made beforehand; they end only with the training."""

    def __init__(self, place: Place, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, place.sequence + 1)
        self.batches = [torch.randint(place.vocabulary, shape, generator=generator) for _ in range(4)]

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from self.batches


class Language(L.LightningModule):
    """A GPT with a fused AdamW."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        torch.manual_seed(0)
        with torch.device(place.device):  # 124 M random numbers
            self.net = GPT(
                place.layers, place.heads, place.width, place.sequence, place.vocabulary,
                dropout=0.0, qk_norm=False, tie_embeddings=True,
            )  # fmt: skip

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.net(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=True)


def trainer(place: Place, callbacks: list[L.Callback], precision: str, **options: Any) -> L.Trainer:
    """A Trainer without output."""
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    accelerator = "gpu" if place.on_cuda else "cpu"
    fixed: dict[str, Any] = {"logger": False, "accelerator": accelerator, "devices": 1, "limit_val_batches": 0}
    return L.Trainer(**{**quiet, **fixed, **options}, precision=precision, callbacks=callbacks)  # type: ignore[arg-type]


def train(place: Place, callbacks: list[L.Callback], batch: int, steps: int = -1, **options: Any) -> None:
    """Train the GPT; without a number of steps until a callback ends it."""
    data = DataLoader(Tokens(place, batch), batch_size=None)
    trainer(place, callbacks, "bf16-mixed", max_steps=steps, max_epochs=-1, **options).fit(Language(place), data)


def batch_size(place: Place) -> int:
    """Sequences in a batch with which a step takes about half of the device's memory."""
    if not place.on_cuda:
        return place.most
    peaks = []
    for batch in (4, 8):
        place.peak()
        train(place, [], batch, 2)
        peaks.append(place.peak())
    each = (peaks[1] - peaks[0]) / 4
    half = torch.cuda.get_device_properties(0).total_memory / 2
    return max(4, min(place.most, int((half - peaks[0]) / each + 4) // 4 * 4))
