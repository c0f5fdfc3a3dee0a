"""The kinds of tensors, and the plain tensors that hold the data of each: used by snapshots and by checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PLAIN = frozenset({Tensor, nn.Parameter})
"""Classes that hold their data themselves; checked first, because almost all tensors are of these."""


_STRIDED = torch.strided


class WrapperLayout(NamedTuple):
    """What a wrapper subclass needs, besides its inner tensors, to be built again.

    A wrapper subclass keeps its data in inner tensors and defines ``__tensor_flatten__`` and ``__tensor_unflatten__``,
    as the states of 8-bit optimizers do.

    Args:
        kind: the class.
        names: attributes that hold the inner tensors.
        context: what ``__tensor_flatten__`` returned besides the names.
        size: of the outer tensor.
        stride: of the outer tensor; None if it is not strided.
    """

    kind: Any
    names: tuple[str, ...]
    context: Any
    size: torch.Size
    stride: tuple[int, ...] | None

    @classmethod
    def of(cls, tensor: Any) -> WrapperLayout:
        """The layout of a tensor of kind ``"wrapper"``."""
        names, context = tensor.__tensor_flatten__()
        stride = tensor.stride() if tensor.layout is torch.strided else None
        return cls(type(tensor), tuple(names), context, tensor.shape, stride)

    def build(self, inner: Sequence[Tensor]) -> Tensor:
        """A tensor of this layout.

        Args:
            inner: one for each of ``names``.
        """
        tensors = dict(zip(self.names, inner, strict=True))
        built: Tensor = self.kind.__tensor_unflatten__(tensors, self.context, self.size, self.stride)
        return built


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its data itself, in one block of memory."""
    if tensor.layout is not _STRIDED:
        return False
    return type(tensor) in PLAIN or not (is_sharded(tensor) or is_wrapper(tensor))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds one part."""
    return hasattr(tensor, "to_local")


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor keeps its data in inner tensors; a DTensor does too, and is tested for first."""
    return hasattr(tensor, "__tensor_flatten__")


def plain_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The plain tensors that hold the data, without gradient.

    Of a DTensor that is the local one, of a wrapper its inner ones, of a sparse tensor its indices and values.

    Args:
        tensors: of any kind.
    """
    found: list[Tensor] = []
    for tensor in tensors:
        if type(tensor) in PLAIN and tensor.layout is _STRIDED:  # almost all, and there may be thousands
            found.append(tensor.detach() if tensor.requires_grad else tensor)
        elif is_plain(tensor):
            found.append(tensor.detach())
        elif is_sharded(tensor):
            found += plain_tensors([tensor.to_local()])  # type: ignore[attr-defined]
        elif is_wrapper(tensor):
            found += plain_tensors([getattr(tensor, name) for name in WrapperLayout.of(tensor).names])
        else:
            found += _sparse_parts(tensor.detach())
    return found


def _sparse_parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def not_dense(tensor: Tensor) -> str | None:
    """What prevents a tensor from being stored as one block of numbers, as a message; None if nothing does.

    >>> not_dense(torch.ones(2)), not_dense(torch.ones(2).to_sparse())
    (None, 'Tensor of layout torch.sparse_coo on cpu')
    """
    if tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested):
        return None
    return f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"


def registered_wrappers() -> Mapping[str, Any]:
    """The wrapper subclasses that may be built from a file, by module and name.

    These are the classes that this process has declared safe with ``torch.serialization.add_safe_globals``: a name in
    a file is looked up here, and nothing is imported for it.
    """
    entries = [each[0] if isinstance(each, tuple) else each for each in torch.serialization.get_safe_globals()]
    classes = [each for each in entries if isinstance(each, type) and issubclass(each, Tensor)]
    return {class_name(each): each for each in classes if hasattr(each, "__tensor_unflatten__")}


def class_name(kind: type) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"
