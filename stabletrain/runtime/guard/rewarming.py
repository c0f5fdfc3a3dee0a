"""A second climb of the learning rate, as after a rollback: a factor on whatever rate is set, within a step only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.core.curves import rewarm_factor
from stabletrain.runtime.internals.temporary_lr import TemporaryLR

_UNCHANGED = contextlib.nullcontext()


class Rewarming:
    """Lowers the learning rates of all parameter groups while the optimizer steps, and restores them afterwards.

    Between the steps the parameter groups hold the rates that the module, its scheduler, a callback or a schedule has
    set. Many schedulers compute the next rate from the current one, so it must not stay lowered.

    Args:
        trainer: in a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._climb: tuple[int, int] | None = None
        self._rates = TemporaryLR()

    def start(self, steps: int) -> int:
        """Start a climb at the next step; it replaces an earlier one.

        Args:
            steps: its length in applied steps, >= 0; 0: only end an earlier one.

        Returns:
            The first applied step with a lowered rate.
        """
        first = self._trainer.global_step
        self._climb = (first, steps) if steps else None
        return first

    @property
    def factor(self) -> float:
        """The factor at the step in progress; between two steps, at the next one. 1 without a climb."""
        return 1.0 if self._climb is None else rewarm_factor(self._trainer.global_step, *self._climb)

    def rate(self, optimizer: Optimizer) -> float | Tensor:
        """The learning rate that the first parameter group has within the step."""
        lr: float | Tensor = optimizer.param_groups[0]["lr"]
        return lr.detach() * self.factor if isinstance(lr, Tensor) else lr * self.factor

    def lowered(self, optimizer: Optimizer) -> contextlib.AbstractContextManager[None]:
        """Lower the rates for one call of ``optimizer.step``."""
        factor = self.factor
        return _UNCHANGED if factor == 1.0 else self._scaled(optimizer, factor)

    @contextlib.contextmanager
    def _scaled(self, optimizer: Optimizer, factor: float) -> Iterator[None]:
        self._rates.scale(optimizer, factor)
        try:
            yield
        finally:
            self._rates.put_back()

    def state(self) -> list[int] | None:
        """First step and length of the climb, in applied steps, for a checkpoint; None: there is none."""
        return None if self._climb is None else list(self._climb)

    def load(self, state: Any) -> None:
        """Restore what `state` returned."""
        self._climb = None if state is None else (int(state[0]), int(state[1]))
