"""What all faults have in common: when they strike, how often, where, and that they clean up."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from stabletrain.chaos.marker import Marker
from stabletrain.errors import require
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.records.event_log import logger


class Fault(Callback):
    """A fault at a known step; subclasses override `strike`, or `begin` and `end`.

    Args:
        at_step: first attempted optimizer step that is struck, from 0.
        steps: how many attempted steps are struck, >= 1.
        rank: the only rank that is struck; None: all.
        once: strike each step once only, also when a rollback or a resumed run comes to it again.
        seed: of the fault's own random numbers, >= 0.

    Raises:
        UserError: if an argument is out of range.
    """

    ends_process: ClassVar[bool] = False
    """The process may end, so even a run that begins anew in the same folder must know that it was struck."""
    lingers: ClassVar[bool] = False
    """The fault stays until the next batch begins: the end of the batch, with its checkpoints, is struck too."""

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

    def strike(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Do what is done once at a struck step, before its first micro-batch."""

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Change something for one micro-batch of a struck step; give `later` what undoes it."""

    def is_due(self, trainer: Trainer, step: int) -> bool:
        """Whether a step is to be struck, were it the first time."""
        return self.at_step <= step < self.at_step + self.steps

    # ---- for subclasses ---------------------------------------------------------------------------------------------

    def require(self, ok: bool, argument: str, expected: str) -> None:
        """Refuse an argument with one message that names it.

        Raises:
            UserError: unless ``ok``.
        """
        require(ok, type(self).__name__, argument, expected, getattr(self, argument), "chaos")

    def later(self, undo: Callable[[], None]) -> None:
        """Remember how to undo a change; done when the batch ends, however it ends."""
        self._undo.append(undo)

    def say(self, trainer: Trainer, step: int, what: str) -> None:
        """Log what is done, and where."""
        logger.warning("chaos: %s (step %d, rank %d)", what, step, trainer.global_rank)

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether this run was struck before."""
        self._marker = Marker(trainer, f"{type(self).__name__}-{self.at_step}")
        self._last, self._batches = -1, 0
        if not self.once:
            return
        if trainer.ckpt_path or self.ends_process:
            struck = self._marker.read()
            if struck is not None:
                self._last, self._batches = struck, _MANY
                self._marker.write(struck)
                self.say(trainer, struck, f"{type(self).__name__} struck before; once=False strikes again")
        else:
            self._marker.remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Strike, if it is time."""
        self._clean()
        step = trainer_internals.logger_step(trainer)
        if self.rank not in (None, trainer.global_rank) or not self.is_due(trainer, step):
            return
        again = step == self._last and 0 < self._batches < trainer.accumulate_grad_batches
        if self.once and step <= self._last and not again:
            return
        first = not again
        self._batches = 1 if first else self._batches + 1
        module = trainer_internals.unwrapped(pl_module)
        if first:
            self._last = step
            if self.once and self._marker is not None:
                self._marker.write(step)
            self.strike(trainer, module, step)
        self.begin(trainer, module, step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put everything back."""
        if not self.lingers:
            self._clean()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back."""
        self._clean()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        self._clean()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back."""
        self._clean()

    def _clean(self) -> None:
        while self._undo:
            self._undo.pop()()


_MANY = int(1e9)
"""Micro-batches, more than any accumulation window has."""


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def wrap_training_step(module: LightningModule, make: Wrapper) -> Callable[[], None]:
    """Give one module instance another ``training_step``; returns the function that undoes this.

    Several faults may wrap one module, and undo it in any order.

    Args:
        module: the module.
        make: makes the new function from the old one.
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
    """Whether a number is finite and greater than 0."""
    return 0.0 < x < math.inf
