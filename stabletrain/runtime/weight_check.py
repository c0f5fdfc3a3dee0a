"""Looking at the weights themselves: damage that neither loss nor gradient has shown yet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from stabletrain.runtime.snapshot_buffers import plain_tensors


class WeightCheck:
    """Compares the norm of each parameter with what it was.

    A tensor is damaged when its norm is not finite, or its root mean square has grown more than ``max_growth`` times
    beyond both its own and the whole model's of then: a tensor that began with zeros may grow to be like the others.

    Args:
        names: of the parameters.
        parameters: the parameters; of sharded ones, this rank's part is looked at.
        max_growth: largest healthy factor, > 1.

    >>> weights = [torch.ones(4), torch.zeros(4)]
    >>> check = WeightCheck(["a", "b"], weights, max_growth=10.0)
    >>> then = check.norms()
    >>> weights[1].fill_(3.0), check.problem(check.norms(), then)
    (tensor([3., 3., 3., 3.]), None)
    >>> weights[1][0] = 100.0
    >>> check.problem(check.norms(), then)
    'the norm of b went from 0 to 100.1, more than 10 times what weights here are like'
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], max_growth: float) -> None:
        self._parameters = list(zip(names, parameters, strict=True))
        self._max_growth = max_growth

    def norms(self) -> list[float]:
        """The norm of each tensor now; waits for the device once."""
        tensors = [tensor for _, tensor in self._tensors()]
        if not tensors:
            return []
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
        where = norms[0].device
        values: list[float] = torch.stack([norm.to(where) for norm in norms]).tolist()
        return values

    def problem(self, now: Sequence[float], then: Sequence[float] | None) -> str | None:
        """What is wrong, in one sentence; None if nothing is.

        Args:
            now: of `norms`.
            then: the same of an earlier, healthy moment; None: only finite numbers are asked for.
        """
        tensors = self._tensors()
        for (name, _), norm in zip(tensors, now, strict=True):
            if not math.isfinite(norm):
                return f"the norm of {name} is {norm}"
        if then is None or not tensors:
            return None
        sizes = [tensor.numel() for _, tensor in tensors]
        usual = math.sqrt(math.fsum(norm * norm for norm in then) / sum(sizes))
        if not usual:
            return None
        for (name, _), norm, before, size in zip(tensors, now, then, sizes, strict=True):
            if norm > self._max_growth * max(before, usual * math.sqrt(size)):
                return (
                    f"the norm of {name} went from {before:.4g} to {norm:.4g}, more than {self._max_growth:g} times "
                    "what weights here are like"
                )
        return None

    def _tensors(self) -> list[tuple[str, Tensor]]:
        plain = ((name, each) for name, parameter in self._parameters for each in plain_tensors((parameter,)))
        return [(name, tensor) for name, tensor in plain if tensor.is_floating_point() and tensor.numel()]


class WeightWatch:
    """Looks at the weights every few attempted steps; one rank's damage is everybody's.

    Args:
        check: compares norms.
        every: attempted steps from one look to the next, >= 1.
    """

    def __init__(self, check: WeightCheck, every: int) -> None:
        self._check, self._every = check, every
        self._looked_at = 0
        self._norms: list[float] | None = None

    def look(self, trainer: Trainer, step: int, suspicious: bool = False) -> str | None:
        """What is wrong, if a look is due; None if nothing is. A collective.

        Args:
            trainer: in a fit.
            step: attempted steps so far.
            suspicious: look now, and compare with the last look that was due: the last step was not healthy, and if
                the weights are the cause, every further step is wasted.
        """
        due = step // self._every != self._looked_at // self._every
        if not (due or suspicious):
            return None
        norms = self._check.norms()
        problem = self._check.problem(norms, self._norms)
        if due:
            self._looked_at, self._norms = step, norms
        if trainer.world_size > 1:
            damaged = trainer.strategy.reduce_boolean_decision(problem is not None, all=False)
            problem = problem or ("weights are damaged on another rank" if damaged else None)
        return problem

    def begin_anew(self) -> None:
        """The weights of an earlier step were put back: sizes are not compared with those of now."""
        self._norms = None
