"""Calls of torch's loss functions with their arguments, in a module that is not changed.

A mode of torch sees every call of a function of ``torch.nn.functional`` while it is open, also those that
``nn.CrossEntropyLoss`` and the like make. A loss that is computed by hand is not seen, nor is one inside a function
that ``torch.compile`` has compiled: use ``torch.compiler.set_stance("force_eager")`` around the step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LOSS_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.ctc_loss,
    F.gaussian_nll_loss,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.nll_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
)
"""The functions whose calls are seen."""
_SYMMETRIC = (F.huber_loss, F.l1_loss, F.mse_loss, F.smooth_l1_loss)
"""Functions whose first two arguments are often swapped: the target is then the one without a gradient."""


class LossCall(NamedTuple):
    """One call of a loss function. Tensors are detached, not copied: read them before the step changes them in place.

    Args:
        name: of the function, such as ``cross_entropy``.
        input: its first argument: for cross_entropy logits, (samples, classes, ...) or (classes,).
        target: its second argument; for cross_entropy class indices, (samples, ...), or probabilities of input's shape.
            Of mse_loss and the like input and target are swapped if only the second argument needs a gradient.
        arguments: the other arguments by name, with their defaults.
        value: what it returned; None: it raised an error.
    """

    name: str
    input: Tensor
    target: Tensor
    arguments: Mapping[str, Any]
    value: Tensor | None

    @property
    def reduction(self) -> str:
        """``mean``, ``sum``, ``none``, or for kl_div ``batchmean``; also where it was given by the older arguments."""
        average, reduce = self.arguments.get("size_average"), self.arguments.get("reduce")
        if average is None and reduce is None:
            return str(self.arguments["reduction"])
        if reduce is False:
            return "none"
        return "sum" if average is False else "mean"


class LossCalls(TorchFunctionMode):
    """While it is open (``with LossCalls(seen): ...``), every call of a loss function is reported.

    The call itself is made as without it, and so is its gradient. No value is read on the host, and no operation is
    added. Calls that a loss function makes itself are not reported; nor are those in a thread other than the one that
    opened it, as in a backward pass on CUDA.

    Args:
        seen: called after each call, also after one that raised an error, outside of this mode.
        functions: the functions to report, from `LOSS_FUNCTIONS`.

    >>> import torch
    >>> from torch import nn
    >>> calls = []
    >>> with LossCalls(calls.append):
    ...     loss = nn.CrossEntropyLoss(reduction="sum")(torch.zeros(2, 3), torch.tensor([0, 2]))
    >>> calls[0].name, tuple(calls[0].input.shape), calls[0].target.tolist(), calls[0].reduction
    ('cross_entropy', (2, 3), [0, 2], 'sum')
    """

    def __init__(
        self, seen: Callable[[LossCall], None], functions: Sequence[Callable[..., Any]] = LOSS_FUNCTIONS
    ) -> None:
        super().__init__()
        self._seen = seen
        self._functions = frozenset(functions)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call; report it if it is one of the functions."""
        named = kwargs or {}
        if func not in self._functions:
            return func(*args, **named)
        value = None
        try:
            value = func(*args, **named)
            return value
        finally:
            if (call := _call(func, args, named, value)) is not None:
                self._seen(call)


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> LossCall | None:
    """The call as it is reported; None if its arguments do not fit the function, which has then raised an error."""
    try:
        bound = _signature(function).bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    (_, first), (_, second), *others = bound.arguments.items()
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None
    if function in _SYMMETRIC and second.requires_grad and not first.requires_grad:
        first, second = second, first
    result = value.detach() if isinstance(value, Tensor) else None
    return LossCall(function.__name__, first.detach(), second.detach(), dict(others), result)


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)
