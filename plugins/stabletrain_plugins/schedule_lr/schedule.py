"""The learning rate as a pure function of the number of applied optimizer steps."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from stabletrain.core.curves import Curve
from stabletrain.core.lengths import RunLength
from stabletrain.core.outcome import Outcome
from stabletrain.core.planned import Planned, Sizes, sampled
from stabletrain.core.schedule import Schedule
from stabletrain.errors import UserError
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.given_twice import attach
from stabletrain.runtime.guard.metrics import LEARNING_RATE
from stabletrain.runtime.guard.publishing import publish
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.run_length import run_length
from stabletrain_plugins.schedule_lr.plot import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = (LEARNING_RATE,)

logger = logging.getLogger("stabletrain")
_SET_RATES = ("StochasticWeightAveraging", "BackboneFinetuning")
"""Callbacks of Lightning that set learning rates during training; by name, as it has two packages."""


class ScheduleLR(GuardMember, Schedule):  # noqa: D101
    __doc__ = Schedule.__doc__

    _curve: Curve | None = None
    _run = RunLength()
    _used: float | Tensor | None = None
    _logged: int = -1
    _step: int = 0
    _saved: tuple[int, float] | None = None
    _undo: Callable[[], None] | None = None
    _written: list[list[float]] | None = None
    _told_of_others = False
    _said = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bases: list[_Bases] = []  # of each optimizer
        self._saved_bases: list[list[float]] = []

    def factor(self, step: int) -> float:
        """The learning rate as a share of the base rate, in the current or last run.

        Args:
            step: index of the update, in applied steps from 0.

        Raises:
            UserError: before the first training has started.
        """
        if self._curve is None:
            raise UserError("schedule: the curve is unknown before training has started; use curve(RunLength(...))")
        return self._curve.factor(step)

    def plot(self, path: str | Path | None = None, steps: int | None = None) -> Figure:
        """Draw the curve.

        Args:
            path: file for the figure; its suffix is the format.
            steps: length of the run in applied steps; None: that of the last training, or `total` if given in steps.

        Returns:
            The matplotlib figure.

        Raises:
            UserError: if the length of the run is not known.
        """
        run = self._run if steps is None else RunLength(total_steps=steps, tokens_per_step=self.tokens_per_step)
        curve = self.curve(run)
        known = self.horizon(run).total_steps
        if known is None:
            raise UserError("schedule: plot(steps=...) needs the length of the run, in applied steps")
        return draw(curve, known, self._bases[0].first if self._bases else None, self.kind, path)

    # ---- in a Trainer -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the position of an earlier run."""
        self._step, self._saved, self._saved_bases = 0, None, []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the guard if other plugins use one; a schedule alone needs none."""
        attach(self)
        if stage != "fit":
            return
        self._curve, self._logged, self._written, self._told_of_others = None, -1, None, False
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(each, GuardMember) for each in callbacks if each is not self):
            super().setup(trainer, pl_module, stage)
            if not self._leads:
                trainer_internals.silence_step_hooks(self, among=ScheduleLR)  # the guard calls on_outcome instead
            return
        if self._fitted is None or self._fitted() is not trainer:
            self.reset()
        self._guard, self._leads, self._fitted = None, False, weakref.ref(trainer)
        trainer_internals.silence_step_hooks(self, among=GuardMember)

    def on_optimizer_ready(self, trainer: Trainer) -> None:
        """Read the base rates, before a checkpoint's optimizer state is loaded, and replace the module's scheduler."""
        if self._undo is not None:
            return
        strategy, configs = trainer.strategy, list(trainer.strategy.lr_scheduler_configs)
        names = ", ".join(type(config.scheduler).__name__ for config in configs)
        self._bases = []
        if configs and not trainer.lightning_module.automatic_optimization:
            raise UserError(
                f"ScheduleLR: {type(trainer.lightning_module).__name__} steps its own scheduler ({names}) by hand, and "
                "both would set the learning rate. Return no scheduler from configure_optimizers, or remove ScheduleLR "
                "(config key schedule=none)"
            )
        if configs:
            keep = "to keep it, remove ScheduleLR (config key schedule=none)"
            self._warn(trainer, f"ScheduleLR replaces the module's own scheduler ({names}) for this run; {keep}")
        strategy.lr_scheduler_configs = []
        self._bases = [_Bases(each.param_groups) for each in trainer.optimizers]
        self._said = bool(configs)

        def undo() -> None:
            strategy.lr_scheduler_configs = configs
            self._write(trainer, 1.0)

        self._undo = undo

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the learning rate: the optimizer exists now."""
        self.on_optimizer_ready(trainer)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the curve, now that the length of the training data is known, and set the first learning rate."""
        if not self._bases:
            return
        self._run = self._long_enough(trainer, run_length(trainer, self.tokens_per_step))
        self._curve = self.curve(self._run)
        if self._saved is not None:
            step, factor = self._saved
            if not math.isclose(self.factor(step), factor, rel_tol=1e-9):
                self._warn(
                    trainer,
                    f"the schedule differs from the checkpoint's (another total, or other arguments): at step {step} "
                    f"the learning rate was {factor:.4g} of the base rate, now it is {self.factor(step):.4g}",
                )
        if others := _callbacks_that_set_rates(trainer):
            self._say_that_others_are_overwritten(trainer, f"those of {', '.join(others)}")
        elif trainer.is_global_zero and not self._said:
            logger.info("ScheduleLR sets the learning rate before every step (schedule=%s)", self.kind)
        self._set(trainer)
        self._saved_bases = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Without a guard: set the learning rate of this step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._guard is None:
            self._set(trainer)
            self._used = _rate(trainer)

    def on_gradients(self, step: int, parameters: Sequence[Tensor]) -> None:
        """With a guard: the step comes next, overwrite a rate that something else has set."""
        assert self._guard is not None, "gradients come from a guard"
        self._set(self._guard.trainer)

    def on_outcome(self, outcome: Outcome) -> None:
        """With a guard: a step is over, set the learning rate of the next one. The guard logs it."""
        assert self._guard is not None, "outcomes come from a guard"
        self._set(self._guard.trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Without a guard: log the learning rate, and set the next one for callbacks that read it before this one."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._guard is not None:
            return
        attempted = trainer_internals.logger_step(trainer)
        due = (attempted + 1) % trainer_internals.log_interval(trainer) == 0 and attempted != self._logged
        if due:
            self._logged = attempted
            if self._used is not None:
                publish(trainer, {"lr": float(self._used)}, {})
        self._set(trainer)

    def planned(self, trainer: Trainer, sizes: Sizes) -> Planned:
        """What it will do, for a dry run.

        Args:
            trainer: of the traced steps.
            sizes: of the run.
        """
        curve = self.curve(sizes.length)
        run = self.horizon(sizes.length)
        text = f"{self.kind}, warm-up of {self.steps('lr_warmup', run)} steps"
        if run.total_steps is not None:
            text += f", {run.total_steps} steps in all; at the end {curve.factor(run.total_steps):.3g} of the rate"
        steps = sizes.length.total_steps
        return Planned(text=text, curve=sampled(curve.factor, steps) if steps else ())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore schedulers and base rates: after an exception Lightning calls no teardown."""
        super().on_exception(trainer, pl_module, exception)
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's schedulers and the base rates of the parameter groups."""
        super().teardown(trainer, pl_module, stage)
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """The position and its factor, to detect another schedule after a resume."""
        factor = self.factor(self._step) if self._curve else None
        return {**super().state_dict(), "step": self._step, "factor": factor, "bases": self._in_order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state_dict)
        step, factor = state_dict["step"], state_dict["factor"]
        if type(step) is not int or not isinstance(factor, float | int | None):
            raise TypeError("step must be a whole number and factor a number or None")
        bases = state_dict.get("bases", [])
        if not all(type(base) is float for each in bases for base in each):
            raise TypeError("bases must be numbers")
        self._saved = None if factor is None else (step, factor)
        self._saved_bases = bases if self._curve is None else []  # at a resume; after a rollback they are known
        self._written = None  # a rollback has restored the rates of another step

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies do not include the running fit."""
        return {**super().__getstate__(), "_undo": None, "_bases": []}

    # ---- helpers ----------------------------------------------------------------------------------------------------

    @property
    def _in_order(self) -> list[list[float]]:
        """The base rates, in the order of the optimizers' groups."""
        trainer = None if self._fitted is None else self._fitted()
        if trainer is None or self._curve is None or self._undo is None:
            return self._saved_bases
        pairs = zip(trainer.optimizers, self._bases, strict=False)
        return [bases.of(each.param_groups) for each, bases in pairs]

    def _set(self, trainer: Trainer) -> None:
        if self._curve is not None:
            if self._written is not None and not self._told_of_others:
                self._look_for_other_rates(trainer, self._written)
            self._step = trainer.global_step
            self._write(trainer, self.factor(self._step))
            if not self._told_of_others:
                self._written = _rates(trainer)

    def _look_for_other_rates(self, trainer: Trainer, written: list[list[float]]) -> None:
        for rates, mine in zip(_rates(trainer), written, strict=False):
            for found, expected in zip(rates, mine, strict=False):  # groups may have been added
                if found != expected and not self._told_of_others:
                    self._say_that_others_are_overwritten(trainer, f"{found:.4g} after step {self._step}, for example")

    def _say_that_others_are_overwritten(self, trainer: Trainer, what: str) -> None:
        self._told_of_others = True
        self._warn(
            trainer,
            f"ScheduleLR sets the learning rate before every step (schedule={self.kind}): rates that the module or "
            f"another callback sets are overwritten ({what}). To keep them, remove ScheduleLR (config key "
            "schedule=none)",
        )

    def _write(self, trainer: Trainer, factor: float) -> None:
        for i, (optimizer, bases) in enumerate(zip(trainer.optimizers, self._bases, strict=False)):
            saved = self._saved_bases[i] if i < len(self._saved_bases) else []
            for group, base in zip(optimizer.param_groups, bases.of(optimizer.param_groups, saved), strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(base * factor)
                else:
                    group["lr"] = base * factor

    def _restore(self) -> None:
        if self._undo is not None:
            self._saved_bases = self._in_order  # a checkpoint may still be saved
            self._undo()
            self._undo = None
            for each in self._bases:
                each.release()

    def _long_enough(self, trainer: Trainer, run: RunLength) -> RunLength:
        """The length of the run; for `fast_dev_run` long enough for ``lr_warmup`` and ``decay``."""
        if not trainer_internals.is_fast_dev_run(trainer) or run.total_steps is None:
            return run
        return replace(run, total_steps=max(run.total_steps, self.steps("lr_warmup", run) + self.steps("decay", run)))

    def _warn(self, trainer: Trainer, message: str) -> None:
        if trainer.is_global_zero:
            logger.warning(message)


class _Bases:
    """The base rates of an optimizer's parameter groups, which may come and go.

    Args:
        groups: at the beginning.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._known = [(group, _base_rate(group)) for group in groups]
        self.first = self._known[0][1] if self._known else math.nan
        """That of the first group, for a plot."""

    def of(self, groups: Sequence[dict[str, Any]], saved: Sequence[float] = ()) -> list[float]:
        """The base rates of the groups now.

        Args:
            groups: of the optimizer.
            saved: from a checkpoint, for groups that its run had added; of another group the rate now is the base.
        """
        known = {id(group): base for group, base in self._known}
        if all(id(group) in known for group in groups):
            return [known[id(group)] for group in groups]
        by_parameter: dict[Tensor | None, float] = {}
        if not any(id(group) in known for group in groups):  # a checkpoint was loaded: all are other dictionaries
            by_parameter = {p: base for group, base in self._known for p in group["params"]}
            self._known = []
        for i, group in enumerate(groups):
            if id(group) not in known:
                base = by_parameter.get(next(iter(group["params"]), None))
                if base is None:
                    base = saved[i] if i < len(saved) else _base_rate(group)
                self._known.append((group, base))
        return self.of(groups)

    def release(self) -> None:
        """Keep no parameters alive."""
        self._known = []


def _base_rate(group: dict[str, Any]) -> float:
    """The learning rate that the optimizer was made with, also if a scheduler's constructor has changed ``lr``."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _rates(trainer: Trainer) -> list[list[float]]:
    """The rates of all groups that can be read without waiting for a device."""
    on_host = [
        [g["lr"] for g in each.param_groups if not isinstance(g["lr"], Tensor) or g["lr"].device.type == "cpu"]
        for each in trainer.optimizers
    ]
    return [[float(lr) for lr in rates] for rates in on_host]


def _callbacks_that_set_rates(trainer: Trainer) -> list[str]:
    names = [type(each).__name__ for each in trainer.callbacks]  # type: ignore[attr-defined]
    return [name for name in names if name in _SET_RATES]


def _rate(trainer: Trainer) -> float | Tensor:
    rate: float | Tensor = trainer.optimizers[0].param_groups[0]["lr"]
    return rate.detach().clone() if isinstance(rate, Tensor) else rate
