"""Unbiased estimates of the squared norm of the gradient and of the trace of its covariance, and their averages."""

from __future__ import annotations

import math
from typing import NamedTuple


class Window(NamedTuple):
    """Sums over the micro-batches of a step, on all ranks.

    Args:
        squares: of |g_i|^2, the squared norms of the micro-batches' mean gradients.
        inverse: of 1 / n_i, of their counts.
        weighted: of w_i^2 / n_i, where g = (w_1 g_1 + w_2 g_2 + ...) / W is the gradient of the step.
        weight: of w_i: W.
        number: of micro-batches.
    """

    squares: float
    inverse: float
    weighted: float
    weight: float
    number: float


def estimate(window: Window, norm: float) -> tuple[float, float] | None:
    """|G|^2 and tr(S), each unbiased and so perhaps negative; None if the window does not determine them.

    E|g_i|^2 = |G|^2 + tr(S) / n_i, and E|g|^2 = |G|^2 + tr(S) (w_1^2 / n_1 + ...) / W^2.

    Args:
        window: of the step.
        norm: |g|, of the step's gradient.

    >>> estimate(Window(squares=2 * 5.0, inverse=2 * 0.5, weighted=2 * 0.5, weight=2.0, number=2.0), 2.0)
    (3.0, 4.0)
    """
    if window.number < 2 or not window.weight > 0:
        return None
    small, big = window.inverse / window.number, window.weighted / window.weight**2
    if not small - big > 1e-9 * small:
        return None
    trace = (window.squares / window.number - norm * norm) / (small - big)
    square = norm * norm - trace * big
    return (square, trace) if math.isfinite(square) and math.isfinite(trace) else None


class Averages(NamedTuple):
    """Averages of the two, with the same weights; never of their ratio, whose mean is another number.

    Args:
        square: weighted sum of |G|^2.
        trace: weighted sum of tr(S).
        weight: sum of the weights.
    """

    square: float = 0.0
    trace: float = 0.0
    weight: float = 0.0

    def add(self, square: float, trace: float, decay: float) -> Averages:
        """The averages with one more measurement."""
        return Averages(
            decay * self.square + (1 - decay) * square,
            decay * self.trace + (1 - decay) * trace,
            decay * self.weight + (1 - decay),
        )

    @property
    def scale(self) -> float | None:
        """tr(S) / |G|^2; None while the noise is too large to say."""
        return self.trace / self.square if self.square > 0 and self.trace > 0 else None
