"""What the guard asks of the callbacks that share it, so that it depends on what they can do and not on their classes.

`stabletrain.runtime.guard.callbacks.GuardMember` is the base class that implements `Member`; a plugin author derives
from it, or from `RuleCallback` or `TransformCallback`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lightning.pytorch import Trainer
from torch import Tensor

from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Rule


class Member(Protocol):
    """A callback that shares the guard of its Trainer."""

    @property
    def state_key(self) -> str:
        """Its key in a checkpoint."""

    @property
    def sets_limits(self) -> bool:
        """It is a `RuleMember`."""

    @property
    def transforms_gradients(self) -> bool:
        """It is a `TransformMember`."""

    @property
    def observes_gradients(self) -> bool:
        """`on_gradients` does something."""

    @property
    def observes_outcomes(self) -> bool:
        """`on_outcome` does something."""

    def on_optimizer_ready(self, trainer: Trainer) -> None:
        """Called once per fit, when the optimizer exists and before the guard reads it."""

    def on_gradients(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Called at every attempted step with complete, unscaled gradients, before any of them is changed."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Called when the outcome of a step is known and the rules have taken it into their history."""

    def metrics(self) -> dict[str, float]:
        """Called at every flush: its own metrics since the last one."""

    def state_dict(self) -> dict[str, Any]:
        """Its state for a checkpoint, the guard's counters included."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class RuleMember(Member, Protocol):
    """A member that sets limits: a rule and its state."""

    state: Any

    @property
    def rule(self) -> Rule[Any]:
        """The rule."""


class TransformMember(Member, Protocol):
    """A member that changes single gradients."""

    plugin: str

    def transform(self, names: Sequence[str], parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Change gradients in place."""

    def commit(self, applied: bool) -> None:
        """Keep or drop the state that the last `transform` prepared."""
