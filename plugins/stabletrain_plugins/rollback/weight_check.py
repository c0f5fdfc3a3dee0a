"""Compares the norms of the weights with those of an earlier step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain.runtime import gradients
from stabletrain.runtime.internals.flatten import flatten
from stabletrain.runtime.snapshots.tensor_kinds import PLAIN, plain_tensors

_USUAL = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_MANY, _SMALL = 16, 256
"""Number of small tensors from which on their norms are computed together, and the elements of a small one."""


class WeightCheck:
    """Finds damaged weights from the norm of each parameter.

    A tensor is damaged when its norm is not finite, or when its root mean square is more than ``max_growth`` times both
    its own earlier one and that of the whole model then: a tensor initialised with zeros may grow to the size of the
    others.

    Args:
        parameters: names and parameters, or a function that returns them now: modules may be added during training. Of
            sharded ones, this rank's part is checked.
        max_growth: largest healthy factor, > 1.

    >>> import torch
    >>> weights = [torch.ones(4), torch.zeros(4)]
    >>> check = WeightCheck(zip("ab", weights), max_growth=10.0)
    >>> then = check.norms()
    >>> weights[1].fill_(3.0), check.problem(check.norms(), then)
    (tensor([3., 3., 3., 3.]), None)
    >>> weights[1][0] = 100.0
    >>> check.problem(check.norms(), then)
    'the norm of b went from 0 to 100.1, more than 10 times the usual size of the weights'
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]] | Callable[[], Iterable[tuple[str, Tensor]]],
        max_growth: float,
    ) -> None:
        if not callable(parameters):
            known = list(parameters)
            parameters = lambda: known  # noqa: E731
        self._read = parameters
        self._max_growth = max_growth
        self._trained: list[bool] = []
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._read_now: list[Tensor] | None = None  # of the last `refresh`, for the norms that are asked for next
        self.refresh()
        self._read_now = None

    def refresh(self) -> tuple[bool, bool]:
        """Read the parameters anew.

        Returns:
            Whether the norms are those of other tensors than before, and whether other parameters are trained.
        """
        known = [(name, p, _float_tensors(p)) for name, p in self._read()]
        self._read_now = [tensor for _, _, tensors in known for tensor in tensors]
        before = (self._names, self._sizes), self._trained
        self._parameters = [p for _, p, tensors in known if tensors]
        self._names = [name for name, _, tensors in known for _ in tensors]
        self._sizes = [tensor.numel() for _, _, tensors in known for tensor in tensors]
        self._trained = [p.requires_grad for _, p, _ in known]
        return (self._names, self._sizes) != before[0], self._trained != before[1]

    def unread_norms(self) -> Tensor | None:
        """As `norms`, without waiting for the device: a vector there; None if there are no tensors."""
        tensors = self._tensors()
        return gradients.tensor_norms(tensors) if tensors else None

    def can_compare(self, norms: Sequence[float]) -> bool:
        """Whether norms from a checkpoint can be compared: never with shards, since it contains rank 0's norms only."""
        return len(norms) == len(self._sizes) and not any(isinstance(p, DTensor) for p in self._parameters)

    def norms(self) -> tuple[float, ...]:
        """The norm of each tensor now; waits for the device once."""
        return tuple(_norms(self._tensors()))

    def _tensors(self) -> list[Tensor]:
        tensors, self._read_now = self._read_now, None  # not kept: of 8-bit floats they are copies
        if tensors is None:
            tensors = [tensor for parameter in self._parameters for tensor in _float_tensors(parameter)]
        return tensors

    def problem(self, now: Sequence[float], then: Sequence[float]) -> str | None:
        """The damage, in one sentence; None if there is none.

        Args:
            now: the result of `norms`.
            then: as `now`, at an earlier healthy step; empty: only check that ``now`` is finite.
        """
        if not all(map(math.isfinite, now)):
            name, norm = next(pair for pair in zip(self._names, now, strict=True) if not math.isfinite(pair[1]))
            return f"the norm of {name} is {norm}"
        usual = math.hypot(*then) / math.sqrt(sum(self._sizes)) if then else 0.0
        if not usual:
            return None
        for name, norm, before, size in zip(self._names, now, then, self._sizes, strict=True):
            if norm > self._max_growth * before and norm > self._max_growth * usual * math.sqrt(size):
                return (
                    f"the norm of {name} went from {before:.4g} to {norm:.4g}, more than {self._max_growth:g} times "
                    "the usual size of the weights"
                )
        return None


def _float_tensors(parameter: Tensor) -> list[Tensor]:
    """The plain tensors of real or complex numbers; 8-bit floats, of which torch computes no norm, as float32."""
    if type(parameter) in PLAIN and parameter.dtype in _USUAL and parameter.layout is torch.strided:
        return [parameter.detach()] if parameter.numel() else []
    plain = [each for each in plain_tensors((parameter,)) if each.numel()]
    numbers = [each for each in plain if each.is_floating_point() or each.is_complex()]
    return [each.float() if each.element_size() == 1 else each for each in numbers]


def _norms(tensors: list[Tensor]) -> list[float]:
    """The L2 norms; of many small tensors on the host all at once, since a kernel for each takes two microseconds."""
    small = [i for i, each in enumerate(tensors) if _is_small(each)]
    if len(small) < _MANY:
        return gradients.tensor_norms(tensors).tolist() if tensors else []
    few = [tensors[i] for i in small]
    lengths = torch.tensor([each.numel() for each in few])
    squares = flatten(few).double().square()
    of_small = iter(torch.segment_reduce(squares, "sum", lengths=lengths).sqrt().tolist())
    chosen = set(small)
    others = [each for i, each in enumerate(tensors) if i not in chosen]
    of_others = iter(gradients.tensor_norms(others).tolist() if others else [])
    return [next(of_small if i in chosen else of_others) for i in range(len(tensors))]


def _is_small(tensor: Tensor) -> bool:
    return (
        tensor.dtype is torch.float32 and tensor.numel() <= _SMALL and tensor.is_cpu and tensor.layout is torch.strided
    )
