"""Compares the norms of the weights with those of an earlier step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain.runtime.snapshots.buffers import plain_tensors


class WeightCheck:
    """Finds damaged weights from the norm of each parameter.

    A tensor is damaged when its norm is not finite, or when its root mean square is more than ``max_growth`` times both
    its own earlier one and that of the whole model then: a tensor initialised with zeros may grow to the size of the
    others.

    Args:
        parameters: names and parameters; of sharded ones, this rank's part is checked.
        max_growth: largest healthy factor, > 1.

    >>> weights = [torch.ones(4), torch.zeros(4)]
    >>> check = WeightCheck(zip("ab", weights), max_growth=10.0)
    >>> then = check.norms()
    >>> weights[1].fill_(3.0), check.problem(check.norms(), then)
    (tensor([3., 3., 3., 3.]), None)
    >>> weights[1][0] = 100.0
    >>> check.problem(check.norms(), then)
    'the norm of b went from 0 to 100.1, more than 10 times the usual size of the weights'
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], max_growth: float) -> None:
        known = [(name, p, _float_tensors(p)) for name, p in parameters]
        self._parameters = [p for _, p, tensors in known if tensors]
        self._names = [name for name, _, tensors in known for _ in tensors]
        self._sizes = [tensor.numel() for _, _, tensors in known for tensor in tensors]
        self._max_growth = max_growth

    def can_compare(self, norms: Sequence[float]) -> bool:
        """Whether norms from a checkpoint can be compared: never with shards, since it contains rank 0's norms only."""
        return len(norms) == len(self._sizes) and not any(isinstance(p, DTensor) for p in self._parameters)

    def norms(self) -> tuple[float, ...]:
        """The norm of each tensor now; waits for the device once."""
        tensors = [tensor for parameter in self._parameters for tensor in _float_tensors(parameter)]
        if not tensors:
            return ()
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
        device = norms[0].device
        return tuple(torch.stack([n if n.device == device else n.to(device) for n in norms]).tolist())

    def problem(self, now: Sequence[float], then: Sequence[float]) -> str | None:
        """The damage, in one sentence; None if there is none.

        Args:
            now: the result of `norms`.
            then: as `now`, at an earlier healthy step; empty: only check that ``now`` is finite.
        """
        for name, norm in zip(self._names, now, strict=True):
            if not math.isfinite(norm):
                return f"the norm of {name} is {norm}"
        usual = math.hypot(*then) / math.sqrt(sum(self._sizes)) if then else 0.0
        if not usual:
            return None
        for name, norm, before, size in zip(self._names, now, then, self._sizes, strict=True):
            if norm > self._max_growth * max(before, usual * math.sqrt(size)):
                return (
                    f"the norm of {name} went from {before:.4g} to {norm:.4g}, more than {self._max_growth:g} times "
                    "the usual size of the weights"
                )
        return None


def _float_tensors(parameter: Tensor) -> list[Tensor]:
    return [each for each in plain_tensors((parameter,)) if each.is_floating_point() and each.numel()]
