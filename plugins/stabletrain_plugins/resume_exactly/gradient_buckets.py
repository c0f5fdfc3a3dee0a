"""The buckets in which DistributedDataParallel averages gradients, kept from one process to the next."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from stabletrain.runtime.internals import ddp_buckets
from stabletrain.runtime.internals.ddp_buckets import Buckets


class GradientBuckets:
    """Saves the buckets, and lets DDP begin with them in the resumed run.

    DDP chooses them after the first step of a process. With three ranks or more they decide in which order the
    gradients of the ranks are added, so that a resumed run would differ in the last bits.

    Args:
        trainer: of a fit, in the hook ``setup``.
        name: of the plugin, for messages.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        self._trainer, self._name = trainer, name
        self._loaded: Buckets | None = None
        self._buckets: Buckets | None = None
        self.close = ddp_buckets.around_wrapping(trainer, lambda: self._loaded, self._wrapped)

    def load(self, buckets: Buckets) -> None:
        """Begin with these; before the strategy wraps the model.

        Args:
            buckets: from `state`.
        """
        self._loaded = buckets

    def state(self, between_steps: bool) -> Buckets | None:
        """The buckets; None if there are none, or if DDP has not chosen them yet.

        Args:
            between_steps: whether they may be chosen now; the same on all ranks, which then have to call this together.
        """
        if self._buckets is None and self._trainer.world_size > 1:
            self._buckets = ddp_buckets.buckets_of(self._trainer.strategy.model, between_steps)
        return self._buckets

    def _wrapped(self, problem: str) -> None:
        if not problem:
            self._buckets = self._loaded
        elif self._trainer.world_size > 2:  # the sum of two is the same in any order
            rank_zero_warn(
                f"{self._name}: DistributedDataParallel cannot average gradients in the buckets of the checkpoint: "
                f"{problem}. The first step after the checkpoint may differ in the last bits"
            )


def checked(buckets: Any) -> Buckets:
    """A state of `GradientBuckets`, read from a checkpoint of any content.

    Raises:
        TypeError: if it is something else.
    """
    lists = isinstance(buckets, list) and all(isinstance(each, list) for each in buckets)
    if not (lists and all(type(name) is str for each in buckets for name in each)):
        raise TypeError("expected lists of names of parameters as buckets")
    return [list(each) for each in buckets]
