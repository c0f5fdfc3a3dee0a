"""Checksums by content: of a batch, and of a module's weights. Nothing that is read is changed, drawn or advanced.

Equal checksums mean equal bits, also on another machine or device: names of types, shapes, dtypes and bytes count, and
neither addresses nor devices.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from stabletrain.optim.kinds import plain_name
from stabletrain.runtime.internals.shards import reshard

_PIECE = 64 << 20
"""Bytes of a tensor that are copied from its device at once."""
_LARGE = 100_000_000
"""Parameters of a model from which on several threads read it."""
_THREADS = 4
_DEPTH = 16
_MOST = 200_000
"""Parts of a batch, besides tensors' elements, that are read: about a second."""
_OPAQUE = (type, nn.Module, FunctionType, MethodType, BuiltinFunctionType, functools.partial, ModuleType)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size)


class Unreadable(Exception):
    """There is a tensor whose values cannot be read, such as one without memory; the message says which."""


def checksum(value: Any) -> str:
    """Return the sha256 of a batch's content, 64 hexadecimal digits.

    Tensors, numpy arrays, numbers and texts count, in tuples, lists, dictionaries and attributes of objects. Of
    iterators, functions and modules only the type counts: reading an iterator would use up what is the training's.

    Args:
        value: anything that a data loader returns.

    Raises:
        Unreadable: if there is a tensor whose values cannot be read.
    """
    return _sha256(_Content().of(value, _DEPTH))


def weights_checksum(module: nn.Module) -> str:
    """Return the sha256 of the parameters and buffers that this process holds, 64 hexadecimal digits.

    Of a divided parameter (a DTensor), this process's part counts. What torch.compile and other wrappers add to names
    does not count.

    Args:
        module: between two steps.

    Raises:
        Unreadable: if there is a parameter without values.
    """
    reshard(module)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    digests = _in_threads(lambda each: _sha256(_tensor(each[1])), tensors)
    return _sha256(f"{plain_name(name)}:{each}\n".encode() for (name, _), each in zip(tensors, digests, strict=True))


def combined(checksums: Iterable[str | None]) -> tuple[str | None, int]:
    """Return one checksum for those of several ranks, and of how many different parts it is made.

    Ranks that all have the same content count once, so that copies have the checksum of a single process.

    Args:
        checksums: by rank; None: unknown there.

    >>> combined(["a", "a"])
    ('a', 1)
    >>> combined(["a", "b"])[1], combined(["a", None])
    (2, (None, 0))
    """
    found = list(checksums)
    if None in found or not found:
        return None, 0
    if len(set(found)) == 1:
        return found[0], 1
    return hashlib.sha256("\n".join(map(str, found)).encode()).hexdigest(), len(found)


def _sha256(parts: Iterable[Any]) -> str:
    try:
        with torch.no_grad():
            return _digest(parts).hex()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise Unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _in_threads(read: Callable[[tuple[str, Tensor]], str], tensors: Sequence[tuple[str, Tensor]]) -> list[str]:
    """Read tensors in order, large ones side by side: one thread does about 1 GB/s."""
    if sum(each.numel() for _, each in tensors if not is_lazy(each)) < _LARGE:
        return [read(each) for each in tensors]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, tensors))


class _Content:
    """Reads what counts of a value. A container or object is read once, however many others hold it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, bytes]] = {}
        """By identity: the object, which stays alive so, and the digest of its content."""
        self._left = _MOST

    def of(self, value: Any, depth: int) -> Iterator[Any]:
        kind = type(value)
        self._left -= 1
        if self._left < 0:
            raise Unreadable(f"it has more than {_MOST:,} parts")
        if isinstance(value, Tensor):
            yield from _tensor(value)
        elif isinstance(value, np.ndarray | np.generic):
            yield from self._array(np.asarray(value), depth)
        elif isinstance(value, _PLAIN):
            yield f"{kind.__name__}:{value!r}\0".encode("utf-8", "surrogatepass")
        elif depth == 0:
            yield f"{kind.__qualname__}\0".encode()
        else:
            if id(value) not in self._known:
                self._known[id(value)] = value, f"{kind.__qualname__}\0".encode()  # for what leads back to it
                self._known[id(value)] = value, _digest(self._container(value, depth - 1))
            yield self._known[id(value)][1]

    def _container(self, value: Any, depth: int) -> Iterator[Any]:
        """What is in a container, or in the attributes of an object, without a call of the object's own methods."""
        kind = type(value)
        if isinstance(value, dict):
            yield f"dict:{dict.__len__(value)}\0".encode()
            for key, each in dict.items(value):
                yield from self.of(key, depth)
                yield from self.of(each, depth)
        elif isinstance(value, list | tuple | deque):
            base: Any = next(each for each in (list, tuple, deque) if isinstance(value, each))
            yield f"{base.__name__}:{base.__len__(value)}\0".encode()
            for each in base.__iter__(value):
                yield from self.of(each, depth)
        elif isinstance(value, set | frozenset):  # their order is another one in each process
            yield f"set:{sorted(b''.join(map(bytes, self.of(each, depth))) for each in value)!r}\0".encode()
        elif isinstance(value, _OPAQUE) or hasattr(kind, "__next__"):
            yield f"{kind.__qualname__}\0".encode()
        else:
            yield f"{kind.__qualname__}\0".encode()
            for name, each in _attributes(value):
                yield f"{name}\0".encode()
                yield from self.of(each, depth)

    def _array(self, array: np.ndarray[Any, Any], depth: int) -> Iterator[Any]:
        yield f"array:{array.dtype.str}:{array.shape}\0".encode()
        if array.dtype.hasobject:
            for each in array.flat:
                yield from self.of(each, depth - 1) if depth else ()
        elif array.size:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _digest(parts: Iterable[Any]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(name, str) and hasattr(value, name):
                found[name] = getattr(value, name)
    yield from sorted(found.items())


def _tensor(tensor: Tensor) -> Iterator[Any]:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    tensor = tensor.detach()
    parts = _parts(tensor)
    if parts is None:
        yield from _values(tensor)
        return
    yield f"{tensor.layout}:{len(parts)}:{'nested' if tensor.is_nested else tuple(tensor.shape)}\0".encode()
    for each in parts:
        yield from _tensor(each)


def _parts(tensor: Tensor) -> Sequence[Tensor] | None:
    """The tensors that hold the values of one that has no memory of its own; None: it has."""
    if tensor.is_nested:
        return tensor.unbind()
    if tensor.layout is torch.sparse_coo:
        whole = tensor.coalesce()
        return whole.indices(), whole.values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    if type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__"):  # a wrapper, as of quantized weights
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    return None


def _values(tensor: Tensor) -> Iterator[Any]:
    yield f"tensor:{tensor.dtype}:{tuple(tensor.shape)}\0".encode()
    flat: Any = tensor.resolve_conj().resolve_neg().reshape(-1)
    pieces: Any = flat.split(max(1, _PIECE // tensor.element_size())) if flat.numel() else ()
    for piece in pieces:
        yield piece.cpu().contiguous().view(torch.uint8).numpy()
