"""Small trainings whose faults are part of the data, so that a test can insert, omit or move a faulty batch."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.limits import Limits, SkipAbove
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule
from stabletrain.runtime.guard.callbacks import as_callback
from stabletrain.testing.checks.equality import differences, nonfinite_numbers
from stabletrain.testing.trainer import quiet_trainer

HEALTHY, NAN_LOSS, NAN_GRAD, INF_GRAD, HIGH_LOSS, LARGE_GRAD = range(6)
LOST = (NAN_LOSS, NAN_GRAD, INF_GRAD, HIGH_LOSS)
"""The faults for which `SkipNonFinite` or `SkipHighLoss` drop a step."""


def adamw_8bit(parameters: Any, lr: float, **options: Any) -> Optimizer:
    """With 8-bit state for small parameters too; imported here, since that takes longer than most fits."""
    import bitsandbytes

    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr, min_8bit_size=16, **options)
    return optimizer


MakeOptimizer = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw-loop": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1, fused=True),
    "adamw-8bit": lambda p: adamw_8bit(p, 0.01, weight_decay=0.1),
}
FUSED = ("adamw-fused", "sgd-fused")


@dataclass(frozen=True)
class SkipHighLossRule(Rule[None]):
    """Drop a step with a loss above 100: a fault of content, where every number is finite."""

    plugin = "skip_high_loss"
    slot = "outliers"

    def init(self) -> None:
        return

    def limits(self, state: None) -> Limits:
        return Limits.of(SkipAbove("loss", 100.0))


@dataclass(frozen=True)
class RecorderRule(Rule[tuple[Outcome, ...]]):
    """Record every outcome, overflows too, and emit an event for each."""

    plugin = "recorder"
    slot = "recorder"
    sees_overflow = True

    def init(self) -> tuple[Outcome, ...]:
        return ()

    def limits(self, state: tuple[Outcome, ...]) -> Limits:
        return Limits()

    def observe(self, state: tuple[Outcome, ...], outcome: Outcome) -> Observation[tuple[Outcome, ...]]:
        event = Event(outcome.step, self.label, "regime", outcome.grad_norm, math.nan, f"norm {outcome.grad_norm}")
        return Observation((*state, outcome), (event,))


@dataclass(frozen=True)
class ShyRecorderRule(RecorderRule):
    """As the recorder, without the overflows, which ordinary rules do not observe."""

    plugin = "shy_recorder"
    sees_overflow = False


SkipHighLoss = as_callback(SkipHighLossRule)
Recorder = as_callback(RecorderRule)
ShyRecorder = as_callback(ShyRecorderRule)


class EventRecorder(Callback):
    """Records all events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_stability_event(self, trainer: Trainer, module: LightningModule, event: Event) -> None:
        self.events.append(event)


class RequestHandler(Callback):
    """Takes requests over and records them.

    Args:
        handles: the kinds of requests.
    """

    def __init__(self, *handles: RequestKind) -> None:
        self.handles = frozenset(handles)
        self.got: list[Request] = []

    def handle_request(self, trainer: Trainer, module: LightningModule, request: Request) -> None:
        self.got.append(request)


class SaveAfter(Callback):
    """Writes a checkpoint at the end of a batch, before or after the guard's own hook by its position in the list.

    Args:
        batch: number of the batch since the start of the run, from 0; all epochs are equally long.
        path: of the checkpoint.
    """

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch * int(trainer.num_training_batches) + batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


class _Spoil(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


class Net(LightningModule):
    """A perceptron with batch normalisation; a batch is ``(x, fault)``."""

    def __init__(
        self, optimizer: str = "adamw-foreach", scheduler: str | None = None, dropout: float = 0.0, norm: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)]
        self.net = nn.Sequential(*layers, nn.Linear(16, 1))
        self.optimizer, self.scheduler = optimizer, scheduler
        self.raise_at: int | None = None

    def training_step(self, batch: tuple[Tensor, int], batch_idx: int) -> Tensor:
        if batch_idx == self.raise_at:
            raise RuntimeError("the module's own bug")
        x, fault = batch
        if fault == NAN_LOSS:
            x = torch.full_like(x, math.nan)  # ruins running statistics, too
        y = self.net(x)
        spoil = {NAN_GRAD: math.nan, INF_GRAD: math.inf, LARGE_GRAD: 1e3}.get(fault)
        if spoil is not None:
            y = _Spoil.apply(y, spoil)
        loss = (y.float() - x.sum(1, keepdim=True)).square().mean()
        return loss + 1000.0 if fault == HIGH_LOSS else loss

    def validation_step(self, batch: tuple[Tensor, int], batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean(), batch_size=len(batch[0]))

    def test_step(self, batch: tuple[Tensor, int], batch_idx: int) -> None:
        self.net(batch[0])

    def predict_step(self, batch: tuple[Tensor, int], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if self.scheduler is None:
            return optimizer
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": self.scheduler}}


Batch = tuple[Tensor, int]


def batches(*faults: int, seed: int = 0) -> list[Batch]:
    """One batch for each fault code; a batch's numbers depend on its position only."""
    return [(torch.randn(8, 6, generator=torch.Generator().manual_seed(seed + i)), f) for i, f in enumerate(faults)]


class _Stream(IterableDataset[Batch]):
    def __init__(self, items: Sequence[Batch]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.items)


def loader(items: Sequence[Batch], sized: bool = True) -> Any:
    return DataLoader(list(items) if sized else _Stream(items), batch_size=None)  # type: ignore[arg-type]


def scaler(**options: Any) -> MixedPrecision:
    """fp16 on the CPU, with a loss scaler."""
    grad_scaler = torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 3, **options})
    return MixedPrecision("16-mixed", "cpu", scaler=grad_scaler)


def trainer(*callbacks: Callback, fp16: bool = False, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 1, "plugins": [scaler()] if fp16 else None}
    return quiet_trainer(*callbacks, **{**defaults, **options})


def fit(
    module: LightningModule,
    items: Any,
    *callbacks: Callback,
    ckpt_path: Any = None,
    val_items: Any = None,
    **options: Any,
) -> Trainer:
    """Train with `trainer` and `run`, by default for one epoch over the items; return the trainer."""
    mine = trainer(*callbacks, **options)
    run(mine, module, items, val_items, ckpt_path=ckpt_path)
    return mine


def run(mine: Trainer, module: LightningModule, items: Any, val_items: Any = None, **options: Any) -> None:
    """Call ``Trainer.fit``, without Lightning's warnings about such small fits.

    Args:
        mine: the trainer.
        module: the module.
        items: the batches, or a loader.
        val_items: the batches of the validation, or a loader; None: no validation.
        options: further arguments of ``Trainer.fit``.
    """
    with warnings.catch_warnings():
        for text in (
            "returned `None`",
            "yielded None",
            "have no `val_dataloader`",
            "does not have many workers",
            "callbacks used to create the checkpoint",
            "is not resumable",
        ):
            warnings.filterwarnings("ignore", f".*{text}")
        mine.fit(module, *(loader(each) if isinstance(each, list) else each for each in (items, val_items)), **options)


def everything(mine: Trainer) -> dict[str, Tensor]:
    """All that a step may change, by name; of sharded tensors the local parts."""
    module, outer = mine.lightning_module, mine.optimizers[0]
    optimizer = getattr(outer, "optim", outer)  # of a ZeroRedundancyOptimizer
    found: dict[str, Any] = {f"module.{name}": value for name, value in module.state_dict().items()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(p, {}).items():
            for j, each in enumerate(value if isinstance(value, list) else [value]):
                found[f"optimizer.{i}.{key}.{j}"] = each
    found |= {f"lr.{i}": group["lr"] for i, group in enumerate(optimizer.param_groups)}
    found["global_step"] = mine.global_step
    found |= {f"scheduler.{i}": config.scheduler.last_epoch for i, config in enumerate(mine.lr_scheduler_configs)}
    grad_scaler = getattr(mine.precision_plugin, "scaler", None)
    if grad_scaler is not None:
        found |= {f"scaler.{key}": float(value) for key, value in grad_scaler.state_dict().items()}
    tensors = {key: torch.as_tensor(value).detach() for key, value in found.items() if value is not None}
    return {key: copy.deepcopy(each.to_local() if isinstance(each, DTensor) else each) for key, each in tensors.items()}


def assert_same(mine: Any, theirs: Any) -> None:
    """Both are equal, bit for bit, and finite."""
    different = list(differences(mine, theirs, "end"))
    assert not different, different
    nonfinite = list(nonfinite_numbers(mine, "end"))
    assert not nonfinite, nonfinite
