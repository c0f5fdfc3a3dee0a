"""A model with hidden state in an attribute, of several kinds, and trainings of it."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from fits import everything
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain.testing.trainer import quiet_trainer

STEPS = 12
"""Batches in an epoch."""


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


class Cell(nn.Module):
    """A recurrent cell that keeps its state in an attribute, of a given kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.kind = nn.LSTMCell(4, 8), kind
        self.state: Any = {"list": [], "in place": torch.zeros(3, 8), "deque": deque(maxlen=2)}.get(kind)
        if kind == "dict":
            self.state = {"count": 0, "inner": {}}

    def read(self) -> tuple[Tensor, Tensor] | None:
        state = self.state
        if isinstance(state, Tensor):
            return state, torch.zeros_like(state)
        if not state:
            return None
        if self.kind == "dict":
            return None if not state["inner"] else (state["inner"]["h"], state["inner"]["c"][0])
        return state[0], state[1]

    def write(self, h: Tensor, c: Tensor) -> None:
        if self.kind in ("list", "deque"):
            self.state.clear()
            self.state.extend([h, c])
        elif self.kind == "dict":
            self.state["inner"] = {"h": h, "c": [c]}
            self.state["count"] += 1
        elif self.kind == "in place":
            with torch.no_grad():
                self.state.copy_(h)
        else:
            self.state = Pair(h, c) if self.kind == "named tuple" else (h, c)  # part of the graph

    def forward(self, x: Tensor) -> Tensor:
        past = self.read()
        h, c = self.cell(x, None if past is None else tuple(each.detach().clone() for each in past))
        self.write(h, c)
        result: Tensor = h
        return result


class Recurrent(LightningModule):
    """Batch numbers in ``bad`` are NaN."""

    def __init__(self, kind: str = "tuple", fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.out, self.fused = Cell(kind), nn.Linear(8, 1), fused
        self.step_outputs: list[Tensor] = []
        self.seen: list[int] = []
        self.mean: float | Tensor = 0.0
        self.means: list[float] = []
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, index = batch
        loss: Tensor = (self.out(self.cell(x)) - x.sum(1, keepdim=True)).square().mean()
        self.step_outputs.append(loss.detach())
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        self.seen.append(int(index[0]))
        self.last = loss.detach()
        return loss

    def on_train_epoch_end(self) -> None:
        self.means.append(float(torch.stack(self.step_outputs).mean()))
        self.step_outputs.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01, fused=self.fused)


KINDS = ["tuple", "named tuple", "list", "deque", "dict", "in place"]


def data(bad: tuple[int, ...] = (), missing: tuple[int, ...] = ()) -> DataLoader[Any]:
    x = torch.randn(STEPS, 3, 4, generator=torch.Generator().manual_seed(0))
    index = torch.arange(STEPS).repeat_interleave(3)
    for each in bad:
        x[each] = math.nan
    kept = [i for i in range(STEPS * 3) if i // 3 not in missing]
    return DataLoader(TensorDataset(x.flatten(0, 1)[kept], index[kept]), batch_size=3)


def train(module: Recurrent, loader: Any, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    mine = quiet_trainer(*callbacks, **{"max_epochs": 1, **options})
    mine.fit(module, loader, ckpt_path=ckpt_path)
    return mine


def end(module: Recurrent, trainer: Trainer) -> dict[str, Tensor]:
    hidden = module.cell.read()
    assert hidden is not None
    return {
        **everything(trainer),
        "h": hidden[0].detach(),
        "c": hidden[1].detach(),
        "last": module.last,
        "mean": torch.as_tensor(module.mean),
        "epoch": torch.tensor(module.means[-1]),
    }
