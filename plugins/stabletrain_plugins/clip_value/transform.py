"""Clip by value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stabletrain.runtime import gradients
from stabletrain.runtime.guard.transform import TransformCallback


@dataclass(eq=False)
class ClipValue(TransformCallback):
    """Clamp every element of the gradient, ``g <- min(max(g, -max_value), max_value)``.

    Elements are clamped one by one, so the direction changes. NaN stays NaN; rules that skip use the raw norm.

    Args:
        max_value: largest absolute value of an element, in the unit of the unscaled gradient, > 0.
        name: name in checkpoints; needed when one run has two of them.

    Raises:
        UserError: if ``max_value`` is not positive.

    References:
        Mikolov, Statistical language models based on neural networks, PhD thesis, Brno 2012; also Goodfellow, Bengio
        and Courville, Deep Learning, section 10.11.1.

    >>> import torch
    >>> gradient = torch.tensor([0.5, -3.0, float("nan")])
    >>> ClipValue(1.0).transform(["w"], [gradient], [gradient])
    >>> gradient
    tensor([ 0.5000, -1.0000,     nan])
    """

    plugin = "clip_value"
    slot = "clip"

    max_value: float = 1.0

    def __post_init__(self) -> None:
        self.require(self.max_value > 0, "max_value", "> 0")

    def transform(self, names: Sequence[str], parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Clamp all gradients."""
        gradients.clamp_(grads, self.max_value)
