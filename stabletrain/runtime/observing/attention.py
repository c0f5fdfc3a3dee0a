"""The attention calls of a forward pass: queries, keys, scale and mask, and what can be read from them.

`AttentionCalls` sees each call of ``F.scaled_dot_product_attention``, those inside `torch.nn.MultiheadAttention` and
the encoder and decoder layers made of it too. Attention that a module computes by other means (its own softmax,
flex_attention, another package's kernel) is not seen, and neither are nested tensors, tensors within ``torch.func``,
and in evaluation without gradients the kernel that holds a whole encoder layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stabletrain.core.layer_names import plain_name
from stabletrain.runtime.internals import modes
from stabletrain.runtime.internals.attention_kernels import AttentionKernels, Seen
from stabletrain.runtime.internals.compiled import is_compiled, is_compiled_wrapper
from stabletrain.runtime.observing.running import RunningModules
from stabletrain.runtime.observing.undisturbed import run_eagerly

MASKED = -1e4
"""A mask that is added to the logits leaves out the keys where it is this or less."""
_ELEMENTS = 1 << 24
"""Logits that are computed at once."""


class AttentionCall(NamedTuple):
    """One call; the tensors are detached, and share their memory with those of the call.

    Args:
        name: of the module whose forward pass makes the call, as in ``named_modules``; empty: of the module itself.
        query: (..., batch, heads, queries, width), or (batch, queries, width) of one head.
        key: as ``query``, with keys; with grouped keys it may have fewer heads, which divide those of ``query``.
        scale: of their product; may be negative.
        mask: broadcasts to the logits (..., heads, queries, keys): true where a key takes part, or a number that is
            added to the logit. None: no mask.
        causal: whether query i sees the keys 0 to i only.
    """

    name: str
    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None
    causal: bool

    @property
    def heads(self) -> int:
        """Number of heads of the queries; 1 if the tensors have no dimension for them, as (batch, queries, width)."""
        return self.query.shape[-3] if self.query.ndim > 3 else 1


class AttentionCalls:
    """While it is open, ``see`` is called for each attention call, before the call runs, without gradients.

    It may be opened and closed any number of times. A compiled module runs eagerly while it is open, in which the last
    bits may differ from those of compiled code. What is computed again in the backward pass, for activation
    checkpointing, is seen too: close it before.

    Args:
        module: whose submodules give the names.
        see: may compute what it likes; an exception in it is one of the forward pass.

    >>> attention, names = nn.MultiheadAttention(8, 2, batch_first=True), []
    >>> x = torch.randn(1, 3, 8)
    >>> with AttentionCalls(nn.Sequential(nn.Identity(), attention), lambda call: names.append(call.name)):
    ...     _ = attention(x, x, x)
    >>> names
    ['1']
    """

    def __init__(self, module: nn.Module, see: Callable[[AttentionCall], None]) -> None:
        self._see = see
        names = {each: plain_name(name) for name, each in module.named_modules()}
        self._runs_eagerly = is_compiled(module)
        self._running = RunningModules(names, filter(_takes_hooks, names) if self._runs_eagerly else None)
        self._opened: ExitStack | None = None

    def open(self) -> None:
        """See the calls from now on, in this thread; does nothing if it is open."""
        if self._opened is not None:
            return
        with ExitStack() as stack:
            if self._runs_eagerly:
                stack.enter_context(run_eagerly())
            self._running.follow(stack)
            stack.callback(modes.enter(_Calls(self._take)))
            self._opened = stack.pop_all()

    def close(self) -> None:
        """See no more calls; does nothing if it is closed."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, seen: Seen) -> None:
        query, key, scale, mask, causal = seen
        if any(each.is_nested or each.is_meta or modes.is_inside_transform(each) for each in (query, key)):
            return
        query, key = query.detach(), key.detach()
        mask = None if mask is None else mask.detach()
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            self._see(AttentionCall(self._running.current, query, key, scale, mask, causal))


def _takes_hooks(module: nn.Module) -> bool:
    return not is_compiled_wrapper(module) and not isinstance(module, torch.jit.ScriptModule)


class _Calls(TorchFunctionMode):
    """Calls a function with what each attention is given."""

    def __init__(self, take: Callable[[Seen], None]) -> None:
        super().__init__()
        self._take = take

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call, and report it first if it is attention."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a function that was compiled without the module
            return func(*args, **kwargs)
        reads = _ARGUMENTS.get(func)
        try:
            found = None if reads is None else reads(*args, **kwargs)
        except TypeError:  # the function says what is wrong with its arguments
            found = None
        if isinstance(found, Seen):
            self._take(found)
        elif found is not None:
            with AttentionKernels(self._take, *found):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Seen:
    return Seen(query, key, scale, attn_mask, is_causal)


def _sizes(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, *args: Any, **kwargs: Any
) -> tuple[int, int]:
    return num_heads, embed_dim_to_check // num_heads


_ARGUMENTS: dict[Any, Callable[..., Seen | tuple[int, int]]] = {
    F.scaled_dot_product_attention: _arguments,
    F.multi_head_attention_forward: _sizes,
}


def logit_bound(call: AttentionCall) -> Tensor:
    """A bound of the logits, max|q| * max|k| * |scale| of each head, without their product; (heads,), float32.

    Masked positions count, so it may be far above the largest logit.
    """
    query, key = _by_head(call)
    query_norm, key_norm = (torch.linalg.vector_norm(each.float(), dim=-1).amax((0, 2)) for each in (query, key))
    bound: Tensor = query_norm * key_norm * abs(call.scale)
    return bound


def largest_logit(call: AttentionCall, elements: int = _ELEMENTS) -> Tensor:
    """The largest logit q k^T * scale of each head, exactly; (heads,), float32.

    Masked and causal entries are left out; what a mask adds to others is not part of the logit. The product has the
    precision of the call's tensors, but float32 for float16, in which it may overflow.

    Args:
        call: the call.
        elements: logits that are computed at once; bounds the memory.

    Returns:
        -inf for a head without a single entry, NaN for one with a NaN.
    """
    found = [block.flatten(2).amax(2).amax(0) for block in _logits(call, elements)]
    return torch.stack(found).amax(0).float() * abs(call.scale)


def entropy(call: AttentionCall, elements: int = _ELEMENTS) -> Tensor:
    """The mean entropy of the attention weights of each head over batch and queries, in nats; (heads,), float32.

    With what a mask adds; without dropout. Queries that see no key are left out.

    Args:
        call: the call.
        elements: logits that are computed at once; bounds the memory.
    """
    total = torch.zeros(call.heads, device=call.query.device)
    count = torch.zeros_like(total)
    for block in _logits(call, elements, adds_mask=True):
        sees_any = ~(block == -math.inf).all(-1)
        of_query = torch.special.entr(block.softmax(-1)).sum(-1)
        total += of_query.masked_fill(~sees_any, 0).sum((0, 2))
        count += sees_any.sum((0, 2))
    return total / count


def _by_head(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Queries and keys as (batch, heads, positions, width), with as many heads of keys as of queries."""
    query, key = (_with_heads(each) for each in (call.query, call.key))
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if query.dtype == torch.float16:
        query, key = query.float(), key.float()
    return (-query if call.scale < 0 else query), key


def _with_heads(tensor: Tensor) -> Tensor:
    """Queries or keys as (batch, heads, positions, width)."""
    if tensor.ndim == 3:
        return tensor[:, None]
    return tensor[(None,) * max(0, 4 - tensor.ndim)].flatten(0, -4)


def _logits(call: AttentionCall, elements: int, adds_mask: bool = False) -> Iterator[Tensor]:
    """Blocks (batch, heads, some queries, keys) of the logits, -inf where masked.

    Without ``adds_mask`` they are still to be multiplied by the size of the scale.
    """
    query, key = _by_head(call)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    mask = call.mask
    if mask is not None:
        mask = mask.expand(*call.query.shape[:-1], keys) if call.query.ndim > 4 else mask
        if call.query.ndim == mask.ndim == 3:
            mask = mask[:, None]
        mask = mask[(None,) * max(0, 4 - mask.ndim)].flatten(0, -4)
    rows = max(1, elements // max(1, batch * heads * keys))
    for start in range(0, queries, rows):
        end = min(start + rows, queries)
        until = min(end, keys) if call.causal else keys  # no query of this block sees more
        block = query[:, :, start:end] @ key[:, :, :until].mT
        if adds_mask:
            block = block.float() * abs(call.scale)
        if call.causal:
            later = torch.ones(end - start, until, dtype=torch.bool, device=block.device).triu_(start + 1)
            block = block.masked_fill_(later, -math.inf)
        if mask is not None:
            part = mask[..., start:end, :] if mask.shape[-2] > 1 else mask
            part = part[..., :until] if part.shape[-1] > 1 else part
            left_out = ~part if part.dtype == torch.bool else part <= MASKED
            block = block + part if adds_mask and part.dtype != torch.bool else block
            block = block.masked_fill_(left_out, -math.inf)
        yield block
