"""A learning rate that is far too high for some steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from stabletrain.chaos.fault import Fault, finite_positive
from stabletrain.runtime.internals.temporary_lr import TemporaryLR


class LearningRateSurge(Fault):
    """Multiplies the learning rate of every parameter group, without changing any schedule.

    The rate is changed inside ``optimizer.step``, after all plugins, and restored before the step returns, so that
    schedules and loggers read the unchanged rate.

    Args:
        at_step: first attempted optimizer step with the fault, from 0.
        factor: on the learning rate, > 0 and finite.
        steps: number of attempted steps with the fault, >= 1.
        once: apply the fault to each step only once, even if a rollback or a resumed run repeats the step.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(self, at_step: int, factor: float = 30.0, steps: int = 20, once: bool = True) -> None:
        super().__init__(at_step, steps, None, once)
        self.factor = factor
        self.require(finite_positive(factor), "factor", "> 0 and finite")
        self._rates = TemporaryLR()

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log the fault."""
        if step == self.at_step:
            self.log_fault(trainer, step, f"learning rate times {self.factor:g} for {self.steps} steps")

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Hook the optimizers' steps for this micro-batch."""
        self.undo_later(self._rates.put_back)
        for optimizer in trainer.optimizers:
            self.undo_later(optimizer.register_step_pre_hook(self._before).remove)
            self.undo_later(optimizer.register_step_post_hook(self._after).remove)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raise the rates now, or after the closure if the step runs forward and backward itself."""
        named = kwargs.get("closure")
        closure = named if named is not None else next((each for each in args if callable(each)), None)
        if closure is None:
            self._rates.scale(optimizer, self.factor)
            return None

        def closed(*inner: Any, **more: Any) -> Any:
            result = closure(*inner, **more)
            self._rates.scale(optimizer, self.factor)
            return result

        if named is not None:
            return args, {**kwargs, "closure": closed}
        return tuple(closed if each is closure else each for each in args), kwargs

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rates.put_back()
