"""Protocols of the callbacks that share a guard; the guard depends on these and not on the callbacks' classes.

`stabletrain.runtime.guard.callbacks.GuardMember` is the base class that implements `Member`; a plugin author derives
from it, or from `RuleCallback` or `TransformCallback`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Rule


class Member(Protocol):
    """A callback that shares the guard of its Trainer."""

    @property
    def state_key(self) -> str:
        """The callback's key in a checkpoint."""

    @property
    def sets_limits(self) -> bool:
        """Whether it is a `RuleMember`."""

    @property
    def transforms_gradients(self) -> bool:
        """Whether it is a `TransformMember`."""

    @property
    def observes_gradients(self) -> bool:
        """Whether the guard has to call `on_gradients`."""

    @property
    def follows_updates(self) -> bool:
        """Whether the guard has to call `on_update`."""

    @property
    def observes_outcomes(self) -> bool:
        """Whether the guard has to call `on_outcome`."""

    @property
    def records_attempts(self) -> bool:
        """Whether the guard has to call `on_attempt`."""

    @property
    def checks_state(self) -> bool:
        """Whether the guard has to call `check_state`."""

    def use_optimizers(self, names: Sequence[str]) -> None:
        """Called once per fit, when the optimizers exist: their names; of a single one empty."""

    def select_optimizer(self, index: int) -> None:
        """Called before a step of another optimizer than the last one, and between two batches with 0."""

    def on_optimizer_ready(self, trainer: Trainer) -> None:
        """Called once per fit, when the optimizer exists and before the guard reads it."""

    def on_gradients(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Called at every attempted step with complete, unscaled gradients, before any of them is changed."""

    def on_update(self, optimizer: Optimizer, dropped: Tensor | None) -> None:
        """Called directly after an optimizer's update; ``dropped``: above 0 if the kernel has dropped it."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Called when the outcome of a step is known and all rules have observed it."""

    def on_attempt(self, outcome: Outcome) -> None:
        """Called first with the outcome of every attempted step, also of one without a loss."""

    def check_state(self, now: bool) -> bool:
        """Called on all ranks between two steps: whether weights and optimizer state are not damaged, the same on all.

        It may call collectives, and request a rollback with `StepGuard.request`.

        Args:
            now: the state is about to be stored, so it is to be checked; False: a step has ended, check if it is time.
        """

    def on_change(self) -> None:
        """Called when the training changes by design: learn baselines anew from here, and judge nothing until then."""

    def metrics(self) -> dict[str, float]:
        """Called at every flush: return the callback's metrics since the last one."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, including the guard's counters."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class RuleMember(Member, Protocol):
    """A member that sets limits: a rule and its state."""

    state: Any

    @property
    def rule(self) -> Rule[Any]:
        """The rule."""


class TransformMember(Member, Protocol):
    """A member that changes each tensor's gradient."""

    plugin: str

    def transform(self, names: Sequence[str], parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Change gradients in place."""

    def commit(self, applied: bool) -> None:
        """Store the state that the last `transform` prepared if the step was applied; else discard it."""
