"""A tiny model and data that are a function of the batch's number, so that a run resumes exactly at any batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, IterableDataset

from stabletrain.core.outcome import Outcome
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.internals.packages import Callback, both
from stabletrain.runtime.stop import TrainingStopped
from stabletrain.testing.trainer import lightning_package, quiet_trainer

STEPS = 96
"""Length of a run in batches, more than the warm-up of stabletrain's own plugins."""

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric", "stabletrain")

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]


class ToyBatches(IterableDataset[tuple[int, float]]):
    """Yields pairs of a batch's number and the factor on its loss; draws no random numbers.

    Args:
        start: number of the first batch.
        faults: factors on the loss of single batches; NaN and infinity are factors too.
        steps: number of the last batch, plus 1.
    """

    def __init__(self, start: int = 0, faults: Mapping[int, float] | None = None, steps: int = STEPS) -> None:
        self.start, self.faults, self.steps = start, dict(faults or {}), steps

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return ((index, self.faults.get(index, 1.0)) for index in range(self.start, self.steps))


class _Toy(nn.Module):
    """A regression with 66 parameters and batch normalisation; its inputs are a function of the batch's number.

    Args:
        make_optimizer: makes the optimizer of the parameters; None: AdamW.
        raise_at: batch at which `training_step` raises; None: never.
    """

    def __init__(self, make_optimizer: MakeOptimizer | None = None, raise_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
        self._make_optimizer = make_optimizer
        self._raise_at = raise_at

    def training_step(self, batch: tuple[int, float], batch_idx: int) -> Tensor:
        """Mean squared error of a fixed function, times the batch's factor."""
        index, factor = batch
        if index == self._raise_at:
            raise ToyError(f"batch {index}")
        grid = torch.arange(32, dtype=torch.float32).reshape(8, 4)
        x = torch.sin(grid * 0.7 + 1.3 * index)
        y = torch.stack([x.sum(1), x.prod(1)], dim=1)
        loss: Tensor = ((self.net(x) - y) ** 2).mean() * factor
        return loss

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of ``make_optimizer``, which gets parameter groups with a ``kind``, or AdamW."""
        if self._make_optimizer is None:
            return AdamW(self.parameters(), lr=1e-3)
        first, norm, _, last = self.net
        return self._make_optimizer(
            [
                {"params": [first.weight, last.weight], "kind": "weight"},
                {"params": [norm.weight], "kind": "norm"},
                {"params": [first.bias, norm.bias, last.bias], "kind": "bias"},
            ]
        )


class ToyModule(_Toy, LightningModule):
    """The toy model, as a module of ``lightning.pytorch``."""


class OtherToyModule(_Toy, both(LightningModule)[-1]):  # type: ignore[misc]
    """The toy model, as a module of ``pytorch_lightning``."""


class ToyError(Exception):
    """Raised by `ToyModule` at the batch ``raise_at``."""


class Watcher(GuardMember):
    """Records outcomes and learning rates, and saves checkpoints after given batches."""

    def __init__(self, save: Mapping[int, Path] | None = None) -> None:
        self.outcomes: list[Outcome] = []
        self.rates: list[float] = []
        self._save = dict(save or {})

    @property
    def state_key(self) -> str:
        """Differs from every plugin's key."""
        return "stabletrain.testing.Watcher"

    def on_outcome(self, outcome: Outcome) -> None:
        """Record the outcome."""
        self.outcomes.append(outcome)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Record the learning rate of the step."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint if one is wanted after this batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (path := self._save.get(int(batch[0]) + 1)) is not None:
            trainer.save_checkpoint(path)


class Fitted(NamedTuple):
    """The state at the end of a run.

    Args:
        weights: parameters and buffers.
        optimizer: the optimizer's state.
        states: each plugin's `state_dict` at the end.
        outcomes: the outcome of every attempted step; empty without plugins.
        rates: the learning rate of every attempted step.
        module: the module.
        stopped: the reason of the plugin that stopped the run; None if none did.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    states: list[dict[str, Any]]
    outcomes: list[Outcome]
    rates: list[float]
    module: LightningModule
    stopped: str | None


def fit(
    folder: Path,
    callbacks: Sequence[Callback] = (),
    *,
    faults: Mapping[int, float] | None = None,
    start: int = 0,
    steps: int = STEPS,
    save: Mapping[int, Path] | None = None,
    resume: Path | None = None,
    make_optimizer: MakeOptimizer | None = None,
    trainer: Mapping[str, Any] | None = None,
    watch: bool = True,
    raise_at: int | None = None,
) -> Fitted:
    """Train `ToyModule` on the CPU without output.

    Args:
        folder: the Trainer's ``default_root_dir``.
        callbacks: the callbacks to train with.
        faults: factors on the loss, by batch.
        start: number of the first batch.
        steps: number of the last batch, plus 1.
        save: number of batches done -> path of a checkpoint to save then.
        resume: path of a checkpoint to resume from; `start` must be the number of batches done there.
        make_optimizer: makes the optimizer; None: AdamW.
        trainer: further arguments of the Trainer.
        watch: whether to record outcomes; False without callbacks is a fit with Lightning alone.
        raise_at: batch at which the module raises `ToyError`.
    """
    watcher = Watcher(save)
    members = [*callbacks, *([watcher] if watch else [])]
    is_other = lightning_package().LightningModule is not LightningModule
    module = (OtherToyModule if is_other else ToyModule)(make_optimizer, raise_at)
    end = _End(callbacks, steps - 1)
    loader = DataLoader(ToyBatches(start, faults, steps), batch_size=None)
    stopped = None
    with quiet():
        options = {"default_root_dir": folder, "max_steps": steps, "max_epochs": 1, "log_every_n_steps": 5}
        running = quiet_trainer(*members, end, **options, **(trainer or {}))
        try:
            running.fit(module, loader, ckpt_path=resume, weights_only=True)
        except TrainingStopped as stop:
            stopped = stop.reason
    return Fitted(
        {name: tensor.detach().clone() for name, tensor in module.state_dict().items()},
        end.optimizer,
        end.states,
        watcher.outcomes,
        watcher.rates,
        module,
        stopped,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence log messages and warnings, and use one thread, which is fastest for such small tensors."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels, threads = [each.level for each in loggers], torch.get_num_threads()
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


class _End(Callback):
    """Copies the optimizer's and the plugins' state after the last batch; must be last in the list of callbacks."""

    def __init__(self, plugins: Sequence[Callback], last: int) -> None:
        self._plugins, self._last = plugins, last
        self.optimizer: dict[str, Any] = {}
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if int(batch[0]) == self._last:
            self._copy(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, TrainingStopped):
            self._copy(trainer)

    def _copy(self, trainer: Trainer) -> None:
        self.optimizer = deepcopy(trainer.optimizers[0].state_dict())
        self.states = [deepcopy(each.state_dict()) for each in self._plugins]
