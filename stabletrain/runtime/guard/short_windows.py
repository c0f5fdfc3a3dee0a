"""The gradient of an accumulation window that holds fewer micro-batches than others, such as the last of an epoch."""

from __future__ import annotations

from torch import Tensor

from stabletrain.runtime import gradients
from stabletrain.runtime.records.event_log import logger


class ShortWindows:
    """Makes the gradient of a shorter window the mean over its micro-batches, too.

    Lightning divides the loss of each micro-batch by the size of a full window, so that the gradient of a window that
    holds half of it is half as large.

    Args:
        tells: whether this process logs a message for the first such window.
    """

    def __init__(self, tells: bool) -> None:
        self._tells = tells

    def weigh(self, grads: list[Tensor], held: int, size: int) -> None:
        """Multiply the gradients in place, if the window is short; on every rank it is equally so.

        Args:
            grads: unscaled and complete.
            held: number of micro-batches with a loss in the window.
            size: number of micro-batches in a full window.
        """
        if not 0 < held < size:
            return
        gradients.scale_(grads, size / held)
        if self._tells:
            self._tells = False
            logger.warning(
                "an accumulation window ends with %d micro-batches instead of %d: its gradient is divided by %d, where "
                "Lightning would divide it by %d",
                held,
                size,
                held,
                size,
            )
