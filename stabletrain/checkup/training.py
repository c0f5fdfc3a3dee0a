"""A few steps of a deep copy of the module, in a Trainer of its own, and what was seen in them."""

from __future__ import annotations

import copy
import random
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.checkup.batches import SameBatches
from stabletrain.checkup.first_steps import FirstSteps
from stabletrain.checkup.prior import Prior, plain_loss
from stabletrain.errors import UserError
from stabletrain.runtime.internals.packages import Callback, both
from stabletrain.runtime.observing.losses import LossCall, LossCalls

LOOKS = 4
"""Steps at the start in which outputs of modules are read."""
_STALE_LOOKS = 10
"""Steps in which gradients before the backward pass are looked at."""

Rates = list[list[float]]
"""Learning rates of one step: of each group of each optimizer."""


@dataclass(kw_only=True)
class Steps:
    """What was seen in the steps of one fit.

    Args:
        module: the copy that was trained.
        loss: of the first backward pass of each batch, in order, or of all with manual optimization; of several values
            the mean.
        plain: loss of the first call of a loss function in each step, see `plain_loss`; None: not known.
        calls: the calls of the first `LOOKS` steps, by step.
        prior: of the targets of all steps.
        rates: learning rates at the start of each step.
        first: what was read inside the module.
        stale: steps of the first ten in which a gradient was not zero before the backward pass.
        without_gradient: names of trained parameters without a gradient in the first step.
        not_in_optimizer: names of trained parameters that no optimizer has.
        batches: that were begun.
        was_late: whether the fit ended because the time was over.
        error: the exception that ended it; None: there was none.
        trace: its traceback.
    """

    module: LightningModule
    loss: list[float] = field(default_factory=list)
    plain: list[float | None] = field(default_factory=list)
    calls: list[list[LossCall]] = field(default_factory=list)
    prior: Prior = field(default_factory=Prior)
    rates: list[Rates] = field(default_factory=list)
    first: FirstSteps = field(default_factory=FirstSteps)
    stale: int = 0
    without_gradient: list[str] | None = None
    not_in_optimizer: list[str] | None = None
    batches: int = 0
    was_late: bool = False
    error: Exception | None = None
    trace: str = ""


class Watch(Callback):
    """Reads the steps of a fit, and may change their learning rates.

    Args:
        steps: filled with what is seen.
        looks: whether to read calls of loss functions, and the module's outputs in its first steps.
        rate: returns the learning rates of a step, by its index; None: the module's own.
        seed: of the generators before each step; None: they are left alone.
        enough: called with the losses after each step: whether the epoch may end.
        stop: ends the epoch.
        warmup: steps of a linear rise of the module's own learning rates; 0: none.
    """

    def __init__(
        self,
        steps: Steps,
        *,
        looks: bool,
        rate: Callable[[int], Rates] | None,
        seed: int | None,
        enough: Callable[[list[float]], bool] | None,
        stop: Callable[[], None],
        warmup: int,
    ) -> None:
        self.warmup = warmup
        self._base: Rates = []
        self.steps, self.looks, self.rate, self.seed, self.enough, self.stop = steps, looks, rate, seed, enough, stop
        self._calls: list[LossCall] = []
        self._mode: LossCalls | None = None
        self._has_loss = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the optimizers' parameters with the module's."""
        self._base = _rates_of(trainer.optimizers)
        held = {id(p) for each in trainer.optimizers for group in each.param_groups for p in group["params"]}
        trained = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
        self.steps.not_in_optimizer = [name for name, p in trained if id(p) not in held]
        for scheduler in trainer.lr_scheduler_configs:
            scheduler.strict = False  # nothing is validated, so a metric that it waits for may never come

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set rates and seed, and begin to read."""
        steps = self.steps
        self._has_loss = False
        if self.rate is not None:
            _set_rates(trainer.optimizers, self.rate(steps.batches))
        elif steps.batches < self.warmup:
            _set_rates(trainer.optimizers, scaled(self._base, (steps.batches + 1) / self.warmup))
        steps.rates.append(_rates_of(trainer.optimizers))
        if self.seed is not None:
            torch.manual_seed(self.seed)
        if self.looks:
            self._calls = []
            self._mode = LossCalls(self._calls.append)
            self._mode.__enter__()  # type: ignore[no-untyped-call]
            if steps.batches < LOOKS:
                steps.first.open(pl_module)
        steps.batches += 1

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """End reading; look at the gradients that are there before the backward pass."""
        self._close()
        if pl_module.automatic_optimization and self.steps.batches <= _STALE_LOOKS:
            held = [p for each in trainer.optimizers for group in each.param_groups for p in group["params"]]
            self.steps.stale += any(p.grad is not None and bool(p.grad.any()) for p in held)
        if self._has_loss and pl_module.automatic_optimization:
            return  # the optimizer asks for the loss of a batch again, as LBFGS does
        self._has_loss = True
        self.steps.loss.append(float(loss.detach().float().mean()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Find parameters without a gradient, in the first step."""
        if self.steps.without_gradient is None and pl_module.automatic_optimization:
            self.steps.without_gradient = [
                name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None
            ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End reading where there was no backward pass; end the epoch if that is enough."""
        self._close()
        if self.enough is not None and self.enough(self.steps.loss):
            self.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing open; the calls of the step that failed are kept."""
        self._close()

    def _close(self) -> None:
        if self._mode is None:
            return
        steps = self.steps
        if steps.batches <= LOOKS:
            steps.first.close()
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._mode = None
        if steps.batches <= LOOKS:
            steps.calls.append(self._calls)
        if self._calls:
            steps.prior.add(self._calls[0])
        steps.plain.append(plain_loss(self._calls[0]) if self._calls else None)


class Lab:
    """Makes copies of a module and trains them on the same batches.

    Args:
        module: never changed.
        batches: that were read of its train loader.
        deadline: of `time.monotonic`, after which no further step is made.
        data: the data module whose hooks for batches are used; None: the module's own.
        arguments: further ones of the Trainer.
        warmup: see `Watch`.
        given: see `SameBatches`.

    Raises:
        UserError: if the module cannot be copied, or the Trainer does not accept an argument.
    """

    def __init__(
        self,
        module: LightningModule,
        batches: Sequence[Any],
        deadline: float,
        data: LightningDataModule | None = None,
        arguments: dict[str, Any] | None = None,
        warmup: int = 0,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self._warmup, self._given = warmup, given
        self.batches, self.deadline = batches, deadline
        self._data, self._arguments = data, {"accelerator": "auto", **(arguments or {})}
        kinds = both(LightningModule)
        self._trainer = both(Trainer)[next(i for i, each in enumerate(kinds) if isinstance(module, each))]
        self._logger = both(DummyLogger)[kinds.index(next(each for each in kinds if isinstance(module, each)))]
        self._module = copied(module)
        try:
            self._made([], None)
        except Exception as error:
            asked = ", ".join(f"{key}={value!r}" for key, value in self._arguments.items())
            raise UserError(f"doctor: {asked}: the Trainer does not accept that: {error}") from error

    def _made(self, callbacks: list[Any], folder: str | None) -> Trainer:
        """A Trainer of one epoch that writes nothing."""
        return self._trainer(
            **self._arguments,
            devices=1,
            max_epochs=1,
            callbacks=callbacks,
            logger=self._logger(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=folder,
        )

    def fit(
        self,
        count: int,
        *,
        module: LightningModule | None = None,
        batches: Sequence[Any] | None = None,
        looks: bool = False,
        rate: Callable[[int], Rates] | None = None,
        seed: int | None = None,
        enough: Callable[[list[float]], bool] | None = None,
    ) -> Steps:
        """Train a new copy; an exception of the module ends it, and is kept.

        Args:
            count: of batches.
            module: a copy of an earlier fit, to go on with; None: a new one.
            batches: to train on; None: all that were read, again and again.
            looks: see `Watch`.
            rate: see `Watch`.
            seed: see `Watch`.
            enough: see `Watch`.
        """
        steps = Steps(module=module or copied(self._module))
        loader = SameBatches(batches or self.batches, count, self.deadline, self._given)
        watch = Watch(steps, looks=looks, rate=rate, seed=seed, enough=enough, stop=loader.stop, warmup=self._warmup)
        vars(steps.module)["configure_callbacks"] = list  # of the run: they may save or stop
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        with tempfile.TemporaryDirectory(prefix="stabletrain-doctor-") as folder:
            try:
                trainer = self._made([watch], folder)
                if self._data is None:
                    trainer.fit(steps.module, loader)
                else:
                    trainer.fit(steps.module, datamodule=_with_loader(self._data, loader))
            except Exception as error:
                steps.error = error
                steps.trace = "".join(traceback.format_exception(error)).rstrip()
        vars(steps.module).pop("configure_callbacks", None)
        steps.was_late = loader.was_late
        return steps


def copied(module: LightningModule) -> LightningModule:
    """A deep copy of a module, without its Trainer and without gradients.

    Args:
        module: to copy.

    Raises:
        UserError: if that is impossible.
    """
    try:
        trainer = module.trainer
    except RuntimeError:  # it is not attached to one
        trainer = None
    try:
        copy_of = copy.deepcopy(module, {} if trainer is None else {id(trainer): None})
    except Exception as error:
        raise UserError(
            f"doctor: {type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and doctor trains "
            "copies only; keep what cannot be copied out of the module's attributes, or pass a module that was not "
            "trained yet"
        ) from error
    for parameter in copy_of.parameters():
        parameter.grad = None
    return copy_of


def _with_loader(data: LightningDataModule, loader: SameBatches) -> LightningDataModule:
    """A shallow copy of a data module, which is set up already and has another train loader."""
    found = copy.copy(data)
    fixed: dict[str, Any] = {
        "prepare_data": lambda: None,
        "setup": lambda stage=None: None,
        "train_dataloader": lambda: loader,
        "teardown": lambda stage=None: None,
    }
    vars(found).update(fixed)
    return found


def scaled(rates: Rates, factor: float) -> Rates:
    """Learning rates times a factor.

    Args:
        rates: of one step.
        factor: on all of them.
    """
    return [[rate * factor for rate in groups] for groups in rates]


def _rates_of(optimizers: Sequence[Optimizer]) -> Rates:
    return [[float(group["lr"]) for group in each.param_groups] for each in optimizers]


def _set_rates(optimizers: Sequence[Optimizer], rates: Rates) -> None:
    for optimizer, of_groups in zip(optimizers, rates, strict=False):
        for group, rate in zip(optimizer.param_groups, of_groups, strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
