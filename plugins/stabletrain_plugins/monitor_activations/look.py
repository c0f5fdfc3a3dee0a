"""What is read during the forward pass of one micro-batch; the numbers stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stabletrain.runtime import gradients
from stabletrain.runtime.internals import modes
from stabletrain.runtime.observing import attention
from stabletrain.runtime.observing.attention import AttentionCall, AttentionCalls
from stabletrain.runtime.observing.losses import LossCall, LossCalls
from stabletrain.runtime.observing.numbers import DeviceNumbers, Stacked
from stabletrain.runtime.observing.outputs import Kind, Output, Outputs
from stabletrain.runtime.observing.undisturbed import run_eagerly

What: TypeAlias = Literal[
    "norm", "largest", "zeros", "saturated", "bound", "logit", "entropy", "output_logit", "output_logz"
]
T = TypeVar("T")
Attention: TypeAlias = Literal["none", "bound", "exact"]

SATURATED = 0.97
"""A tanh beyond +-0.97 has 6 % of its slope at 0 or less; so has a sigmoid beyond the same share of its range."""
_LOGITS = 1 << 24
"""Elements of the logits of which the logsumexp is computed at once."""
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class Key(NamedTuple):
    """What a number is.

    Args:
        what: the reading.
        module: whose output or call it is of.
        elements: that it was computed from.
        again: whether the output is that of a part of the module.
        of_function: whether the module called a function that returned the output.
        head: of attention.
    """

    what: What
    module: str
    elements: int = 1
    again: bool = False
    of_function: bool = False
    head: int = -1


class Look:
    """Reads the outputs, attention and loss calls of a module from its beginning until `close`.

    An error in a reading ends the readings, and not the training.

    Args:
        module: that is trained.
        attention: of attention calls nothing, a bound of the logits, or their largest and the entropy of each head.
        logits: whether the logits at calls of cross_entropy are read.
    """

    def __init__(self, module: nn.Module, attention: Attention, logits: bool) -> None:
        self._numbers = DeviceNumbers[Key]()
        self._last: list[tuple[Key, Tensor]] = []
        self.error: Exception | None = None
        """What a reading has raised."""
        with ExitStack() as stack:
            stack.enter_context(run_eagerly())
            stack.enter_context(Outputs(module, self._safely(self._see_output)))
            if attention != "none":
                see = self._see_bound if attention == "bound" else self._see_attention
                stack.enter_context(AttentionCalls(module, self._safely(see)))
            if logits:
                stack.callback(modes.enter(LossCalls(self._safely(self._see_loss), [F.cross_entropy])))
            self._opened = stack.pop_all()

    def close(self) -> Stacked[Key]:
        """End it; the numbers, on the device."""
        self._opened.close()
        self._last = []
        return self._numbers.stacked()

    def _safely(self, see: Callable[[T], None]) -> Callable[[T], None]:
        """The same function, until one has raised an error."""

        def seen(what: T) -> None:
            if self.error is None:
                try:
                    see(what)
                except Exception as error:
                    self.error = error

        return seen

    def _see_output(self, output: Output) -> None:
        if output.again:
            rows = [
                (key._replace(module=output.module, again=True, of_function=False), value) for key, value in self._last
            ]
        else:
            rows = _of_output(output)
        self._last = rows
        for key, value in rows:
            self._numbers.add(key, value)

    def _see_bound(self, call: AttentionCall) -> None:
        self._numbers.add(Key("bound", call.name), attention.logit_bound(call).amax())

    def _see_attention(self, call: AttentionCall) -> None:
        self._see_bound(call)
        for what, read in (("logit", attention.largest_logit), ("entropy", attention.entropy)):
            self._each_head(what, call, read)  # type: ignore[arg-type]

    def _each_head(self, what: What, call: AttentionCall, read: Callable[[AttentionCall], Tensor]) -> None:
        values = read(call)
        self._numbers.add_each([Key(what, call.name, head=head) for head in range(len(values))], values)

    def _see_loss(self, call: LossCall) -> None:
        logits = call.input
        if isinstance(logits, DTensor) or not logits.numel() or modes.is_inside_transform(logits):
            return
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            self._numbers.add(Key("output_logit", ""), _largest(logits))
            classes = 1 if logits.ndim > 1 else 0
            rows = max(1, _LOGITS * len(logits) // logits.numel()) if logits.ndim > 1 else len(logits)
            parts = [torch.logsumexp(_float(part), classes).sum() for part in torch.split(logits, rows)]
            total = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
            self._numbers.add(Key("output_logz", "", logits.numel() // logits.shape[classes]), total)


def _of_output(output: Output) -> list[tuple[Key, Tensor]]:
    values = gradients.local(output.tensor)
    elements = values.numel()
    if not elements:  # a rank's part of it
        return []
    norm = torch.linalg.vector_norm(values, dtype=torch.float32 if values.dtype in _LOW_PRECISION else None)
    read: list[tuple[What, Tensor]] = [("norm", norm), ("largest", _largest(values))]
    if output.kind == "relu":
        read.append(("zeros", torch.count_nonzero(values)))
    elif output.kind:
        read.append(("saturated", _beyond(values, output.kind)))
    return [(Key(what, output.module, elements, of_function=output.of_function), value) for what, value in read]


def _beyond(values: Tensor, kind: Kind) -> Tensor:
    """The number of saturated values."""
    distance = values.abs() if kind == "tanh" else (values - 0.5).abs()
    return (distance > (SATURATED if kind == "tanh" else SATURATED / 2)).sum()


def _largest(values: Tensor) -> Tensor:
    dtype = torch.float32 if values.dtype in _LOW_PRECISION else None
    largest: Tensor = torch.linalg.vector_norm(values, ord=float("inf"), dtype=dtype)
    return largest


def _float(values: Tensor) -> Tensor:
    return values.float() if values.dtype in _LOW_PRECISION else values
