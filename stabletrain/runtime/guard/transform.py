"""Base class of per-tensor transforms of the gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from stabletrain.runtime.guard.callbacks import PluginMember


@dataclass(eq=False)
class TransformCallback(PluginMember, ABC):
    """A per-tensor change of the gradients, after the raw norm is computed and before the bounds are applied.

    A subclass is a ``@dataclass(eq=False)`` of its arguments. Transforms do not commute, so they run in the order of
    their plugins' names. State that depends on past steps lives in device tensors: `transform` prepares the next
    state, `commit` stores it if the step is applied. In both modes of the guard, `commit` is called before the next
    `transform` and before any checkpoint. A subclass with such state names its attributes in ``per_optimizer`` and sets
    them in `start_optimizer`, so that each optimizer of a module has its own.

    Args:
        name: what checkpoints call this transform; needed when one run has two of a kind. Default: the plugin's name.
    """

    clips: ClassVar[bool] = True
    transforms_gradients: ClassVar[bool] = True

    name: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def transform(self, names: Sequence[str], parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Change gradients in place, with `stabletrain.runtime.gradients`, without a device synchronization.

        Args:
            names: of the parameters that have a gradient, at least one, in the optimizer's order.
            parameters: the parameters themselves.
            grads: their gradients.
        """

    def commit(self, applied: bool) -> None:
        """Called once after each `transform`: whether the step was applied."""
