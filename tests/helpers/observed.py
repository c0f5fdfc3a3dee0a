"""Small models of several kinds whose forward pass is observed, and trainings of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fits import fit
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabletrain.workloads import CharGPT, DigitsCNN

WORDS, STEPS = 20, 4


class Small(LightningModule):
    """Trained with AdamW."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Recurrent(Small):
    """An LSTM, with a ReLU that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(WORDS, 8), nn.LSTM(8, 12, 2, batch_first=True)
        self.head = nn.Linear(12, WORDS)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = torch.relu(self.rnn(self.embedding(batch[:, :-1]))[0])
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())


class Encoder(Small):
    """Layers of torch, whose attention is in ``nn.MultiheadAttention``; the step returns a dictionary.

    Args:
        reentrant: of activation checkpointing; None: none.
        dropout: of the layers.
    """

    def __init__(self, reentrant: bool | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding, self.reentrant = nn.Embedding(WORDS, 8), reentrant
        layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True) for _ in range(2)]
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(8, WORDS)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        x = self.embedding(batch[:, :-1])
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())}


class Case(NamedTuple):
    """A training.

    Args:
        make: makes the module.
        items: the batches.
        options: of the Trainer.
    """

    make: Callable[[], LightningModule]
    items: list[Any]
    options: dict[str, Any]


def tokens(number: int) -> list[Tensor]:
    return list(torch.randint(0, WORDS, (number, 3, 9), generator=torch.Generator().manual_seed(1)))


def images(number: int) -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.rand(6, 1, 8, 8, generator=draw), torch.randint(0, 10, (6,), generator=draw)) for _ in range(number)]


def gpt() -> LightningModule:
    return CharGPT(2, 2, 8, 8, vocab_size=WORDS, sample_length=0)


CASES = {
    "char_gpt": Case(gpt, tokens(STEPS), {}),
    "digits_cnn": Case(lambda: DigitsCNN(4), images(STEPS), {}),
    "lstm": Case(Recurrent, tokens(STEPS), {}),
    "encoder": Case(Encoder, tokens(STEPS), {}),
    "encoder, checkpointing": Case(lambda: Encoder(False), tokens(STEPS), {}),
    "encoder, reentrant checkpointing": Case(lambda: Encoder(True), tokens(STEPS), {}),
    "accumulation": Case(gpt, tokens(2 * STEPS), {"accumulate_grad_batches": 2}),
    "bf16": Case(gpt, tokens(STEPS), {"precision": "bf16-mixed"}),
}


def train(case: Case, *callbacks: Callback, **options: Any) -> Trainer:
    """Train a case from the same start."""
    torch.manual_seed(0)
    return fit(case.make(), case.items, *callbacks, **{"limit_val_batches": 0, **case.options, **options})
