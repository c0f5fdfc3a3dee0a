"""Decode what `encoding` wrote: plain Python objects from JSON and tensors; nothing in them can run code.

Somebody else may have written the file, so every value is checked for its form before it is built.
"""

from __future__ import annotations

import base64
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.fields import INT_LIMIT, Fields, shown
from stabletrain.runtime.checkpoints.hyper_parameters import with_attributes
from stabletrain.runtime.checkpoints.tensor_file import Kind
from stabletrain.runtime.internals.quantized_state import import_known
from stabletrain.runtime.snapshots.tensor_kinds import WrapperLayout, registered_wrappers

_MAX_DEPTH = 100
"""Containers within containers that are read, far below Python's recursion limit."""
_MAX_DIMENSIONS = 64
_CANNOT_BUILD = (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AttributeError)
"""What constructors of torch and Python raise for a value that does not fit."""


Objects = Callable[[Sequence[Any]], Any]
"""Finds the object of a running module that a checkpoint holds as text, by its path; LookupError: there is none."""


def decode(tree: Any, tensors: Sequence[Tensor], objects: Objects | None = None) -> Any:
    """The inverse of `Encoded` in `encoding`.

    Args:
        tree: its tree, or any other value that JSON can hold.
        tensors: its tensors, or equal ones.
        objects: finds what is kept as text; None: it stays text.

    Raises:
        CheckpointError: if the tree has a tag that this version does not know, a value that does not fit its tag, a
            tensor that does not exist, or one of a class that this process has not declared safe, or if it is nested
            too deeply.
    """
    return _Decoder(tensors, objects).value(tree, 0)


def tensor_kinds(index: Any) -> list[Kind]:
    """The tensors of a checkpoint, from the list ``[[name, dtype, shape], ...]`` of its state file.

    Raises:
        CheckpointError: if it is anything else, or a name appears twice.
    """
    if not isinstance(index, list):
        _damaged("the list of tensors", index)
    kinds = []
    for entry in index:
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)):
            _damaged("an entry of the list of tensors", entry)
        name, dtype, shape = entry
        kinds.append(Kind(name, _stored_dtype(dtype), _sizes(shape, f"the shape of {shown(name)}")))
    if len({kind.name for kind in kinds}) != len(kinds):
        raise CheckpointError("checkpoint: two tensors have one name")
    return kinds


def dtype_of(name: Any) -> torch.dtype:
    """The dtype of a name such as ``bfloat16``.

    Raises:
        CheckpointError: if torch has no such dtype.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"checkpoint: this version of torch has no dtype {shown(name)}")
    return found


class _Decoder:
    """Decodes values; ``depth`` is the number of containers around each."""

    def __init__(self, tensors: Sequence[Tensor], objects: Objects | None = None) -> None:
        self._tensors, self._objects = tensors, objects

    def value(self, tree: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"checkpoint: it is nested deeper than {_MAX_DEPTH} containers")
        if isinstance(tree, list):
            return [self.value(item, depth + 1) for item in tree]
        if not isinstance(tree, dict):
            if type(tree) is float and not math.isfinite(tree):
                _damaged("a number", tree)
            return tree
        tag, value = _tagged(tree)
        if tag in ("T", "N", "W"):
            return self._tensor(tag, value, depth)
        if tag == "P":
            return self._permuted(value, depth)
        if tag in ("d", "o"):
            return self._dict(tag, value, tree.get("m"), depth)
        if tag == "a":
            return with_attributes(self._dict("d", value, None, depth))
        if tag == "r":
            return self._text(value)
        if tag in _COLLECTIONS:
            if not isinstance(value, list):
                _damaged(f"a value of kind {shown(tag)}", value)
            return self._collection(tag, value, depth)
        if tag in _SCALARS:
            return _built(tag, _SCALARS[tag], value)
        raise CheckpointError(
            f"checkpoint: unknown kind of value {shown(tag)}; a newer stabletrain wrote it: update this one"
        )

    def _tensor(self, tag: str, value: Any, depth: int) -> Any:
        if tag == "W":
            return self._wrapper(Fields(value, "checkpoint: a tensor of another class"), value, depth)
        if type(value) is not int or not 0 <= value < len(self._tensors):
            raise CheckpointError(
                f"checkpoint: expected a tensor from 0 to {len(self._tensors) - 1}, got {shown(value)}"
            )
        tensor = self._tensors[value]
        return _built(tag, Tensor.numpy, tensor) if tag == "N" else tensor

    def _permuted(self, value: Any, depth: int) -> Tensor:
        """A tensor whose dimensions are in another order in memory."""
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
            _damaged("a tensor with an order of dimensions", value)
        tensor, order = self._tensor("T", value[0], depth), value[1]
        if not all(type(each) is int for each in order) or sorted(order) != list(range(tensor.dim())):
            _damaged("the order of a tensor's dimensions", order)
        return tensor.permute([order.index(each) for each in range(len(order))])  # type: ignore[no-any-return]

    def _dict(self, tag: str, value: Any, metadata: Any, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {} if tag == "d" else OrderedDict()
        for key, item in _pairs(value):
            known = self.value(key, depth + 1)
            found[_hashable(known)] = self.value(item, depth + 1)
        if len(found) != len(value):
            raise CheckpointError("checkpoint: a key appears twice")
        if metadata is not None:
            found._metadata = self._metadata(metadata, depth + 1)  # type: ignore[attr-defined]
        return found

    def _text(self, value: Any) -> Any:
        """The text of an object among the hyper-parameters, or the object itself."""
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], list)):
            _damaged("an object as text", value)
        path, text = value
        if not path or not all(type(key) in (str, int) for key in path) or not isinstance(text, str):
            _damaged("an object as text", value)
        if self._objects is None:
            return text
        try:
            return self._objects(path)
        except (LookupError, TypeError):
            return text

    def _metadata(self, tree: Any, depth: int) -> dict[str, Any]:
        """The versions in a module's state, as torch reads them."""
        found = self.value(tree, depth)
        entries = found.items() if isinstance(found, dict) else [(None, None)]
        for name, entry in entries:
            if not (isinstance(name, str) and isinstance(entry, dict)):
                _damaged("the versions of a module's state", found)
            version = entry.get("version")
            if version is not None and type(version) is not int:
                _damaged("the version of a module", version)
        return found  # type: ignore[no-any-return]

    def _collection(self, tag: str, value: list[Any], depth: int) -> Any:
        if tag == "size":
            return torch.Size(_sizes(value, "a size"))
        if tag == "q":
            if len(value) != 2 or not isinstance(value[0], list):
                _damaged("a deque", value)
            items, maxlen = value
            if maxlen is not None and (type(maxlen) is not int or not len(items) <= maxlen < INT_LIMIT):
                _damaged("the length of a deque", maxlen)
            return deque((self.value(item, depth + 1) for item in items), maxlen=maxlen)
        items = [self.value(item, depth + 1) for item in value]
        return tuple(items) if tag == "t" else _COLLECTIONS[tag](map(_hashable, items))

    def _wrapper(self, fields: Fields, value: Any, depth: int) -> Tensor:
        name = fields.text("class")
        kind = registered_wrappers().get(name)
        if kind is None and import_known(name):
            kind = registered_wrappers().get(name)
        if kind is None:
            raise CheckpointError(
                f"checkpoint: it holds a tensor of class {name}, which this process has not declared safe to "
                "build from a file: before reading, import the package that registers it, or call "
                "torch.serialization.add_safe_globals with the class"
            )
        pairs = list(_pairs(value.get("inner")))
        names = tuple(each for each, _ in pairs)
        inner = [self.value(each, depth + 1) for _, each in pairs]
        if not all(isinstance(each, str) for each in names) or not all(isinstance(each, Tensor) for each in inner):
            _damaged(f"the inner tensors of a {name}", names)
        size, stride = _sizes(value.get("size"), "a size"), _sizes(value.get("stride"), "a stride")
        layout = WrapperLayout(kind, names, self.value(value.get("context"), depth + 1), torch.Size(size), stride)
        try:
            return layout.build(inner)
        except Exception as error:  # code of the class, which may check its parts in any way
            raise CheckpointError(f"checkpoint: a {name} cannot be built ({type(error).__name__}: {error})") from None


_COLLECTIONS: dict[str, Any] = {"t": tuple, "s": set, "fs": frozenset, "size": torch.Size, "q": deque}


def _float(text: Any) -> float:
    if not isinstance(text, str) or len(text) > 40:
        raise TypeError
    return float(text)


def _complex(parts: Any) -> complex:
    real, imaginary = parts
    return complex(_float(real), _float(imaginary))


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError
    return value


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "f": _float,
    "c": _complex,
    "b": lambda value: base64.b64decode(_text(value), validate=True),
    "path": lambda value: Path(_text(value)),
    "device": lambda value: torch.device(_text(value)),
    "dtype": dtype_of,
}


def _tagged(tree: dict[str, Any]) -> tuple[str, Any]:
    """The tag of a JSON object and its value; besides them only an ordered dict has a second entry."""
    entries = iter(tree.items())
    tag, value = next(entries, ("", None))
    if len(tree) > 1 and not (tag == "o" and len(tree) == 2 and "m" in tree):
        raise CheckpointError(f"checkpoint: a value of kind {shown(tag)} has more than one entry")
    return tag, value


def _pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, list):
        _damaged("a list of pairs", value)
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2):
            _damaged("a pair", pair)
        yield pair[0], pair[1]


def _hashable(key: Any) -> Any:
    try:
        hash(key)
    except TypeError:
        raise CheckpointError(f"checkpoint: {shown(key)} cannot be a key or a member of a set") from None
    return key


def _stored_dtype(name: Any) -> torch.dtype:
    dtype = dtype_of(name)
    if str(dtype).startswith("torch.q"):  # quantized: `encoding` refuses such tensors
        _damaged("the dtype of a tensor", name)
    return dtype


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    """Sizes or strides: at most 64, all >= 0."""
    valid = isinstance(value, list) and len(value) <= _MAX_DIMENSIONS
    if not valid or not all(type(each) is int and 0 <= each < INT_LIMIT for each in value):
        _damaged(what, value)
    return tuple(value)


def _built(tag: str, build: Callable[[Any], Any], value: Any) -> Any:
    try:
        return build(value)
    except CheckpointError:
        raise
    except _CANNOT_BUILD:
        _damaged(f"a value of kind {shown(tag)}", value)


def _damaged(what: str, got: Any) -> NoReturn:
    raise CheckpointError(f"checkpoint: {what} cannot be {shown(got)}")
