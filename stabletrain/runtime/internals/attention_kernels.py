"""The attention that torch computes inside ``F.multi_head_attention_forward``, where no function mode looks.

That function is handed to a `TorchFunctionMode` as a whole, and what it calls is not. A dispatch mode within it sees
the fused kernels, ``aten::_scaled_dot_product_..._attention``. Where torch uses none (dropout on the CPU,
``need_weights=True``, `SDPBackend.MATH`) it sees a product of matrices, perhaps a mask that is added to it, and a
softmax.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_FUSED = "aten::_scaled_dot_product_"
_PRODUCTS = ("aten::bmm", "aten::baddbmm")
_ADDITIONS = ("aten::add", "aten::add_")
_SOFTMAXES = ("aten::_softmax", "aten::_safe_softmax")


class Seen(NamedTuple):
    """What a kernel is given.

    Args:
        query: (batch, heads, queries, width).
        key: (batch, heads, keys, width).
        scale: of their product; None: one over the root of the width.
        mask: added to the logits, or true where a key takes part; None: no mask.
        causal: whether a query sees the keys up to its own position only.
    """

    query: Tensor
    key: Tensor
    scale: float | None
    mask: Tensor | None
    causal: bool


class _Reading(threading.local):
    """How many calls of ``see`` are in progress in this thread."""

    depth = 0


_READING = _Reading()


class AttentionKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, ``see`` is called for each attention, before its softmax or fused kernel runs.

    Args:
        see: called with what the kernel is given; the tensors are the ones that it gets, not copies.
        heads: of the attention.
        width: of a head.
    """

    def __init__(self, see: Callable[[Seen], None], heads: int, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see, self._heads, self._width = see, heads, width
        self._product: Seen | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look whether it is attention or a part of it."""
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # first DTensor makes plain operators of it
        kwargs = kwargs or {}
        if _READING.depth:  # within what another one of these modes, which is open too, is called with
            return func(*args, **kwargs)
        schema = func._schema
        if schema.name.startswith(_FUSED) and "backward" not in schema.name:
            names = [each.name for each in schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            mask = given.get("attn_mask", given.get("attn_bias"))
            self._report(Seen(given["query"], given["key"], given.get("scale"), mask, bool(given.get("is_causal"))))
        elif schema.name in _PRODUCTS:
            *bias, left, right = args[:3] if schema.name == "aten::baddbmm" else args[:2]
            if left.shape[-1] == self._width and not left.shape[0] % self._heads:
                mask = self._by_head(bias[0]) if bias else None
                self._product = Seen(self._by_head(left), self._by_head(right).mT, 1.0, mask, False)
        elif self._product is not None and schema.name in _ADDITIONS and isinstance(args[1], Tensor):
            self._product = self._product._replace(mask=args[1])
        elif self._product is not None and schema.name in _SOFTMAXES:
            product, self._product = self._product, None
            self._report(product)
        return func(*args, **kwargs)

    def _report(self, seen: Seen) -> None:
        _READING.depth += 1
        try:
            self._see(seen)
        finally:
            _READING.depth -= 1

    def _by_head(self, tensor: Tensor) -> Tensor:
        """(batch * heads, ...) as (batch, heads, ...); a mask for all of them stays as it is."""
        batch = tensor.shape[0] // self._heads
        return tensor if tensor.shape[0] % self._heads else tensor.reshape(batch, self._heads, *tensor.shape[1:])
