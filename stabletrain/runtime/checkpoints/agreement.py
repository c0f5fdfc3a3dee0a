"""The processes that read a checkpoint together, all the same one."""

from __future__ import annotations

from lightning.pytorch import Trainer

from stabletrain.runtime.checkpoints.loading import Alone, Shared
from stabletrain.runtime.ranks import Ranks


class Together(Alone):
    """All processes of a trainer. The methods are collectives.

    Args:
        trainer: whose strategy has set up its environment.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._strategy, self._ranks = trainer.strategy, Ranks(trainer)
        self.is_first = trainer.is_global_zero

    def share(self, value: Shared) -> Shared:
        """What rank 0 gave."""
        return self._strategy.broadcast(value)

    def first_problem(self, problem: str) -> str:
        """The problem of the first rank that has one; empty if none has."""
        everyone = self._ranks.gather(problem)
        if everyone[0]:
            return everyone[0]
        return next((f"rank {rank}: {each}" for rank, each in enumerate(everyone) if each), "")
