"""Fits on two ranks under DDPZeRO1Strategy and DDPStrategy: the same weights, rates and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import two_ranks
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR, SequentialLR, StepLR

from stabletrain import DDPZeRO1Strategy, Rollback, SaveCheckpoints, SkipNonFinite, UserError


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    weights, others = [], []
    for p in parameters:
        (weights if p.ndim > 1 else others).append(p)
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]
    return torch.optim.AdamW(groups, 0.01)


class Scheduled(two_ranks.Net):
    """Schedulers in a scheduler, and another one for evaluation of its state."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        parts = [LinearLR(optimizer, 0.5, total_iters=3), StepLR(optimizer, 2)]
        whole = SequentialLR(optimizer, parts, milestones=[3])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": whole, "interval": "step"}}


def strategy(name: str) -> DDPStrategy:
    return (DDPStrategy if name == "ddp" else DDPZeRO1Strategy)(process_group_backend="gloo")


def train(
    folder: Path, name: str, *, make: Any = Scheduled, ckpt_path: str | None = None, max_steps: int = -1
) -> dict[str, Any]:
    """The weights, the rates after each step, the elements of optimizer state of this rank, and a whole checkpoint."""
    rates: list[list[float]] = []
    note = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])
    )
    save = SaveCheckpoints(folder=str(folder / name / "saved"), every=2, background=False)
    held: list[int] = []
    count = LambdaCallback(on_train_end=lambda trainer, *_: held.append(_state_of(trainer.optimizers[0])))
    stack = [SkipNonFinite(), Rollback(every=4, trust_after=1), save, note, count]
    weights, mine = two_ranks.train(
        folder / name,
        strategy(name),
        *stack,
        make_optimizer=two_groups,
        make=make,
        ckpt_path=ckpt_path,
        max_steps=max_steps,
    )
    return {"weights": weights, "rates": rates, "held": held[0], "last": save.last, "step": mine.global_step}


def _state_of(optimizer: Any) -> int:
    inner = getattr(optimizer, "optim", optimizer)
    return sum(v.numel() for each in inner.state.values() for v in each.values() if isinstance(v, Tensor) and v.ndim)


class Prodigy(torch.optim.SGD):
    """Named as an optimizer that needs all parameters in each step."""


def whole(folder: Path) -> dict[str, Any]:
    """Whole runs under both, and messages of what cannot be divided."""
    found: dict[str, Any] = {name: train(folder / "whole", name) for name in ("ddp", "zero1")}
    for name, make_optimizer in {
        "joint": lambda p: Prodigy(p, 0.01),
        "dtypes": lambda p: torch.optim.SGD([*p, torch.nn.Parameter(torch.ones(1, dtype=torch.float64))], 0.01),
    }.items():
        try:
            two_ranks.train(folder / name, strategy("zero1"), SkipNonFinite(), make_optimizer=make_optimizer)
        except UserError as error:
            found[name] = str(error)
    return found


def resumed(folder: Path) -> dict[str, Any]:
    """A whole run, and runs that are stopped and resumed, also under the other strategy."""
    found = {"ddp": train(folder / "whole", "ddp")}
    for name, other in (("ddp", "zero1"), ("zero1", "ddp"), ("zero1", "zero1")):
        first = train(folder / f"first-{name}-{other}", name, max_steps=8)
        found[f"{name} to {other}"] = train(folder / f"then-{name}-{other}", other, ckpt_path=first["last"])
    return found
