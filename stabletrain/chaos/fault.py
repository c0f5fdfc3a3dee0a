"""The base class of all faults: when, how often and on which ranks they act, and how they undo their changes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from stabletrain.chaos.marker import Marker
from stabletrain.errors import require
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.records.event_log import logger


class Fault(Callback):
    """A fault at a known step; subclasses override `apply` or `begin`.

    Args:
        at_step: first attempted optimizer step with the fault, from 0.
        steps: number of attempted steps with the fault, >= 1.
        rank: the only rank with the fault; None: all ranks.
        once: apply the fault to each step only once, even if a rollback or a resumed run repeats the step.
        seed: of the fault's own random numbers, >= 0.

    Raises:
        UserError: if an argument is out of range.
    """

    ends_process: ClassVar[bool] = False
    """Whether the fault may end the process. Then a new run in the same folder does not repeat it, either."""
    lingers: ClassVar[bool] = False
    """Whether the fault lasts until the next batch starts, and so affects checkpoints saved after the batch."""

    def __init__(self, at_step: int, steps: int = 1, rank: int | None = None, once: bool = True, seed: int = 0) -> None:
        self.at_step = at_step
        self.steps = steps
        self.rank = rank
        self.once = once
        self.seed = seed
        self.require(at_step >= 0, "at_step", ">= 0")
        self.require(steps >= 1, "steps", ">= 1")
        self.require(rank is None or rank >= 0, "rank", ">= 0 or None")
        self.require(seed >= 0, "seed", ">= 0")
        self._marker: Marker | None = None
        self._last = -1
        self._batches = 0
        self._undo: list[Callable[[], None]] = []

    # ---- what subclasses override -----------------------------------------------------------------------------------

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Called once at an affected step, before its first micro-batch."""

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Called before every micro-batch of an affected step; register how to undo a change with `undo_later`."""

    def is_due(self, trainer: Trainer, step: int) -> bool:
        """Return whether the fault affects a step, apart from ``once``."""
        return self.at_step <= step < self.at_step + self.steps

    # ---- for subclasses ---------------------------------------------------------------------------------------------

    def require(self, ok: bool, argument: str, expected: str) -> None:
        """Raise an error that names an argument and its config key, unless it is valid.

        Raises:
            UserError: unless ``ok``.
        """
        require(ok, type(self).__name__, argument, expected, getattr(self, argument), "chaos")

    def undo_later(self, undo: Callable[[], None]) -> None:
        """Register a function that undoes a change; called when the batch ends, or fails."""
        self._undo.append(undo)

    def log_fault(self, trainer: Trainer, step: int, what: str) -> None:
        """Log the fault with its step and rank."""
        logger.warning("chaos: %s (step %d, rank %d)", what, step, trainer.global_rank)

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the marker file: a resumed run does not repeat the fault, if ``once``."""
        self._marker = Marker(trainer, f"{type(self).__name__}-{self.at_step}")
        self._last, self._batches = -1, 0
        if not self.once:
            return
        if trainer.ckpt_path or self.ends_process:
            last = self._marker.read()
            if last is not None:
                self._last, self._batches = last, _MANY
                self._marker.write(last)
                name = type(self).__name__
                self.log_fault(trainer, last, f"{name} has happened before; once=False repeats it")
        else:
            self._marker.remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Apply the fault if this step is affected."""
        self._clean()
        step = trainer_internals.logger_step(trainer)
        if self.rank not in (None, trainer.global_rank) or not self.is_due(trainer, step):
            return
        again = step == self._last and 0 < self._batches < AccumulationWindow(trainer).size
        if self.once and step <= self._last and not again:
            return
        first = not again
        self._batches = 1 if first else self._batches + 1
        module = trainer_internals.unwrapped(pl_module)
        if first:
            self._last = step
            if self.once and self._marker is not None:
                self._marker.write(step)
            self.apply(trainer, module, step)
        self.begin(trainer, module, step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Undo the changes."""
        if not self.lingers:
            self._clean()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo the changes."""
        self._clean()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo the changes."""
        self._clean()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo the changes."""
        self._clean()

    def _clean(self) -> None:
        while self._undo:
            self._undo.pop()()


_MANY = int(1e9)
"""More micro-batches than any accumulation window has."""


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def wrap_training_step(module: LightningModule, make: Wrapper) -> Callable[[], None]:
    """Wrap ``training_step`` of one module instance; return a function that removes the wrapper.

    Several faults may wrap one module and remove their wrappers in any order.

    Args:
        module: the module.
        make: returns the wrapped function.
    """
    layers: list[Wrapper] | None = getattr(module.training_step, "layers", None)
    if layers is None:
        layers = []
        _install_layers(module, layers)
    layers.append(make)

    def undo() -> None:
        layers.remove(make)
        if not layers:
            module.training_step.restore()  # type: ignore[attr-defined]

    return undo


def _install_layers(module: LightningModule, layers: list[Wrapper]) -> None:
    inner, own = module.training_step, "training_step" in module.__dict__

    @functools.wraps(inner)  # Lightning reads the signature
    def training_step(*args: Any, **kwargs: Any) -> Any:
        step: Callable[..., Any] = inner
        for make in layers:
            step = make(step)
        return step(*args, **kwargs)

    def restore() -> None:
        if own:
            module.training_step = inner  # type: ignore[method-assign]
        else:
            del module.__dict__["training_step"]

    training_step.layers, training_step.restore = layers, restore  # type: ignore[attr-defined]
    module.training_step = training_step  # type: ignore[method-assign]


def finite_positive(x: float) -> bool:
    """Return whether a number is finite and above 0."""
    return 0.0 < x < math.inf
