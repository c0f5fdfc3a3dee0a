"""The learning rate as a pure function of the number of applied optimizer steps."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from stabletrain.core import curves
from stabletrain.core.curves import Curve
from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.lengths import RunLength
from stabletrain.core.outcome import Outcome
from stabletrain.core.schedule import Schedule
from stabletrain.errors import UserError
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.run_length import run_length
from stabletrain_plugins.schedule_lr.plot import draw
from stabletrain_plugins.schedule_lr.rewarm import RewarmHooks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("stabletrain")


class ScheduleLR(GuardMember, Schedule):  # noqa: D101
    __doc__ = Schedule.__doc__

    handles = frozenset({RequestKind.REWARM})

    _curve: Curve | None = None
    _run = RunLength()
    _used: float | Tensor | None = None
    _logged: int = -1
    _step: int = 0
    _rewarm: tuple[int, int] | None = None
    _saved: tuple[int, float] | None = None
    _undo: Callable[[], None] | None = None
    _keeps_module_scheduler = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bases: list[list[float]] = []

    def factor(self, step: int) -> float:
        """The learning rate as a share of the base rate, in the current or last run; with a second warm-up.

        Args:
            step: index of the update, in applied steps from 0.

        Raises:
            UserError: before the first training has started.
        """
        if self._curve is None:
            raise UserError("schedule: the curve is unknown before training has started; use curve(RunLength(...))")
        rewarm = curves.rewarm_factor(step, *self._rewarm) if self._rewarm else 1.0
        return self._curve.factor(step) * rewarm

    def rewarm(self, steps: int) -> None:
        """Start a second warm-up at the next step, on top of the curve, as after a rollback.

        Args:
            steps: length in applied steps, >= 0; 0: end a second warm-up. A later call replaces an earlier one.
        """
        self._rewarm = (self._step, steps) if steps else None

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
        return draw(curve, known, self._bases[0][0] if self._bases else None, self.kind, path)

    # ---- in a Trainer -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the position and the second warm-up of an earlier run."""
        self._step, self._rewarm, self._saved = 0, None, None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the guard if other plugins use one; a schedule alone needs none."""
        if stage != "fit":
            return
        self._curve, self._logged, self._keeps_module_scheduler = None, -1, False
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
        if configs and self.module_scheduler == "keep":
            sets = f"the module's own scheduler ({names}) sets the learning rate"
            self._warn(trainer, f"{sets}; ScheduleLR logs it, and warms it up again after a rollback")
            self._undo, self._keeps_module_scheduler = RewarmHooks(trainer, lambda: self._rewarm).remove, True
            return
        if configs:
            keep = 'to keep it, set module_scheduler="keep" or default_callbacks(schedule="none")'
            self._warn(trainer, f"ScheduleLR replaces the module's own scheduler ({names}) for this run; {keep}")
        strategy.lr_scheduler_configs = []
        self._bases = [[_base_rate(group) for group in each.param_groups] for each in trainer.optimizers]

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
        if not self._bases and not self._keeps_module_scheduler:
            return
        self._run = self._long_enough(trainer, run_length(trainer, self.tokens_per_step))
        if self._keeps_module_scheduler:
            return
        self._curve = self.curve(self._run)
        if self._saved is not None:
            step, factor = self._saved
            if not math.isclose(self.factor(step), factor, rel_tol=1e-9):
                self._warn(
                    trainer,
                    f"the schedule differs from the checkpoint's (another total, or other arguments): at step {step} "
                    f"the learning rate was {factor:.4g} of the base rate, now it is {self.factor(step):.4g}",
                )
        self._set(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Without a guard: set the learning rate of this step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._guard is None:
            self._set(trainer)
            self._used = _rate(trainer)

    def on_outcome(self, outcome: Outcome) -> None:
        """With a guard: a step is over, set the learning rate of the next one."""
        assert self._guard is not None, "outcomes come from a guard"
        self._used = _rate(self._guard.trainer)
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
            metrics = self.metrics()
            trainer_internals.publish_metrics(trainer, metrics, {})
            if trainer.is_global_zero:
                for each in trainer.loggers:
                    each.log_metrics(metrics, step=attempted)
        self._set(trainer)

    def metrics(self) -> dict[str, float]:
        """`lr`: the learning rate of the first parameter group in the last step; once after each step."""
        used, self._used = self._used, None
        return {} if used is None else {"lr": float(used)}

    def handle_request(self, trainer: Trainer, module: LightningModule, request: Request) -> None:
        """Start a second warm-up at the next step, because a plugin requests it."""
        self._step = trainer.global_step
        steps = request.steps
        if steps is None:
            steps = self.steps("lr_warmup" if self.lr_rewarm is None else "lr_rewarm", self.horizon(self._run))
        self.rewarm(steps)
        self._set(trainer)
        if self._guard is not None:
            reason = f"second learning-rate warm-up over {steps} steps from step {self._step}: {request.reason}"
            attempted = self._guard.counters.attempted - 1
            self._guard.report(Event(attempted, "schedule_lr", "rewarm", float(steps), math.nan, reason))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore schedulers and base rates: after an exception Lightning calls no teardown."""
        super().on_exception(trainer, pl_module, exception)
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's schedulers and the base rates of the parameter groups."""
        super().teardown(trainer, pl_module, stage)
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """The position and its factor, to detect another schedule after a resume, and a second warm-up."""
        plain = super().state_dict()
        factor = self.factor(self._step) if self._curve else None
        return {**plain, "step": self._step, "factor": factor, "rewarm": list(self._rewarm) if self._rewarm else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state_dict)
        self._saved = None if state_dict["factor"] is None else (state_dict["step"], state_dict["factor"])
        rewarm = state_dict["rewarm"]
        self._rewarm = (rewarm[0], rewarm[1]) if rewarm else None

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies do not include the running fit."""
        return {**super().__getstate__(), "_undo": None}

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _set(self, trainer: Trainer) -> None:
        if self._curve is not None:
            self._step = trainer.global_step
            self._write(trainer, self.factor(self._step))

    def _write(self, trainer: Trainer, factor: float) -> None:
        for optimizer, bases in zip(trainer.optimizers, self._bases, strict=False):
            bases += [_base_rate(group) for group in optimizer.param_groups[len(bases) :]]
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(base * factor)
                else:
                    group["lr"] = base * factor

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _long_enough(self, trainer: Trainer, run: RunLength) -> RunLength:
        """The length of the run; for `fast_dev_run` long enough for ``lr_warmup`` and ``decay``."""
        if not trainer_internals.is_fast_dev_run(trainer) or run.total_steps is None:
            return run
        return replace(run, total_steps=max(run.total_steps, self.steps("lr_warmup", run) + self.steps("decay", run)))

    def _warn(self, trainer: Trainer, message: str) -> None:
        if trainer.is_global_zero:
            logger.warning(message)


def _base_rate(group: dict[str, Any]) -> float:
    """The learning rate that the optimizer was made with, also if a scheduler's constructor has changed ``lr``."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _rate(trainer: Trainer) -> float | Tensor:
    rate: float | Tensor = trainer.optimizers[0].param_groups[0]["lr"]
    return rate.detach().clone() if isinstance(rate, Tensor) else rate
