"""Whether a non-finite gradient in fp16 training is due to the loss scale or to the batch. Standard library only."""

from __future__ import annotations

import math
from typing import NamedTuple

from stabletrain.core.outcome import Outcome

_MARGIN = 8.0
"""Factor below scales that went well at which a non-finite gradient is no longer put down to the scale."""
_GROWTH = 2.0
"""Factor that the norm of the scaled gradient must be below norms that went well; more, and gradients have grown."""
_ENOUGH = 10
"""Steps that must have gone well at the larger scale."""


class ScaleHistory(NamedTuple):
    """The loss scales at which gradients were finite.

    Args:
        scales: the ten highest scales of steps with a finite gradient, descending; equal ones are all in it.
        norms: the ten highest norms of scaled gradients (scale times gradient norm) of such steps, descending.
        last_scale: scale of the last step, if its gradient was finite; else 0.
        last_norm: norm of its scaled gradient.
    """

    scales: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    last_scale: float = 0.0
    last_norm: float = 0.0

    def add(self, outcome: Outcome) -> ScaleHistory:
        """The history after one more step. A non-finite loss and a zero gradient say nothing about the scale."""
        if not math.isfinite(outcome.loss) or outcome.grad_norm == 0.0:
            return self
        if outcome.overflow or not math.isfinite(outcome.grad_norm):
            return self._replace(last_scale=0.0, last_norm=0.0)
        scale, norm = outcome.loss_scale, outcome.loss_scale * outcome.grad_norm
        return ScaleHistory(_insert(self.scales, scale), _insert(self.norms, norm), scale, norm)

    def blames_batch(self, scale: float) -> bool:
        """Whether a non-finite gradient at a finite loss comes from the batch and not from this scale.

        It does at a scale of 1 and below, where there is nothing left to lower. Above, three conditions must hold: the
        step before went well at this scale, so that two such steps in a row are an overflow; ten steps went well at
        8 times this scale or more; and ten steps had scaled gradients of twice the norm of the step before, so that
        gradients that have grown since then still lower the scale.

        Args:
            scale: the loss scale of the step.

        >>> history = ScaleHistory((1024.0,) * 10, (1024.0,) * 10, last_scale=128.0, last_norm=128.0)
        >>> history.blames_batch(128.0), history.blames_batch(256.0)
        (True, False)
        """
        if scale <= 1.0:
            return True
        return (
            self.last_scale == scale
            and _MARGIN * scale <= _proven(self.scales)
            and _GROWTH * self.last_norm <= _proven(self.norms)
        )


def _insert(highest: tuple[float, ...], value: float) -> tuple[float, ...]:
    if len(highest) == _ENOUGH and value <= highest[-1]:
        return highest
    return tuple(sorted((*highest, value), reverse=True)[:_ENOUGH])


def _proven(highest: tuple[float, ...]) -> float:
    return highest[-1] if len(highest) == _ENOUGH else 0.0
