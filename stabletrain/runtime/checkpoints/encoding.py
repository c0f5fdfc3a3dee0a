"""Encode a checkpoint as data: its tensors in a list, everything else as JSON.

No pickle is used, so reading a file cannot run code from it. JSON objects are tagged containers, so that integer keys,
tuples, sets and non-finite numbers are restored with their types:

| Python | JSON |
|---|---|
| None, bool, int, str, finite float, list | itself |
| dict, ordered dict | `{"d": [[key, value], ...]}`, `{"o": ...}`; `"m"`: the versions in a module's state |
| tuple, set, frozenset, deque | `{"t": [...]}`, `{"s": [...]}`, `{"fs": [...]}`, `{"q": [[...], maxlen]}` |
| tensor (also one of which each process has a `Part`), numpy array | `{"T": index}`, `{"N": index}` |
| tensor whose dimensions are in another order in memory | `{"P": [index, order]}` |
| wrapper-subclass tensor | `{"W": {"class": ..., "inner": [[name, tensor], ...], "context", "size", "stride"}}` |
| inf and nan, complex, bytes | `{"f": "nan"}`, `{"c": [re, im]}`, `{"b": base64}` |
| torch dtype, device, size | `{"dtype": "bfloat16"}`, `{"device": "cpu"}`, `{"size": [...]}` |
| path | `{"path": "..."}` |
| hyper-parameters: dict with attributes, object | `{"a": [[key, value], ...]}`, `{"r": [path, repr]}` |

A tensor that appears in several positions (tied weights) is stored once, and is one tensor again when it is read.
Subclasses are restored as their base class: an enum member as its value, a defaultdict as a dict, a parameter as a
tensor. The exception are wrapper subclasses that are declared safe with ``torch.serialization.add_safe_globals``, both
when they are written and when they are read.
"""

from __future__ import annotations

import base64
import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabletrain.runtime.checkpoints import hyper_parameters
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.parts import Part
from stabletrain.runtime.snapshots.state_tree import DictNode, Flattener, ObjectNode, SequenceNode, TensorNode
from stabletrain.runtime.snapshots.tensor_kinds import WrapperLayout, class_name, not_dense, registered_wrappers

_MAX_DEPTH = 64
"""Containers within containers that may be stored; `decoding` reads some more."""
_TAGS = {list: None, tuple: "t", set: "s", frozenset: "fs", deque: "q"}


class Encoded:
    """A checkpoint as a tree of JSON values and a list of plain tensors.

    Args:
        checkpoint: a dict, as Lightning's ``dump_checkpoint`` gives it.

    Raises:
        CheckpointError: if it holds something that cannot be stored as data; the message names its path.

    >>> encoded = Encoded({"step": 3, "weights": torch.ones(2), "seen": (1, 2)})
    >>> encoded.tree, encoded.names
    ({'d': [['step', 3], ['weights', {'T': 0}], ['seen', {'t': [1, 2]}]]}, ['weights'])
    >>> from stabletrain.runtime.checkpoints.decoding import decode
    >>> decode(encoded.tree, encoded.tensors)
    {'step': 3, 'weights': tensor([1., 1.]), 'seen': (1, 2)}
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.parts: dict[str, int] = {}
        """Name and index of each `Part`, of which `tensors` has an empty tensor of the same dtype and whole shape."""
        self.omitted: list[str] = []
        """The hyper-parameters that are kept as text, each with its path and class."""
        encoder = _Encoder(self)
        pairs = []
        for key, value in checkpoint.items():
            try:
                node = encoder.entry(str(key), value)
            except RecursionError:
                raise CheckpointError(
                    f"checkpoint: {key} holds a container that contains itself, or is nested deeper than {_MAX_DEPTH}"
                ) from None
            if node is not _OMITTED:
                pairs.append([encoder.value(key, "key"), node])
        self.tree: dict[str, Any] = {"d": pairs}


class _Encoder:
    """Adds values to an `Encoded`: flattens them as snapshots do, and converts the skeleton to JSON."""

    def __init__(self, encoded: Encoded) -> None:
        self._encoded = encoded
        self._flattener = Flattener(take=lambda value: value)
        self._first_at: dict[int, int] = {}  # address -> index of the first tensor that begins there
        self._others_at: dict[int, list[int]] = {}  # and of other tensors that begin there
        self._used = {"__metadata__"}  # a name that the tensor file reserves
        self._depth = 0  # number of containers around the value that is encoded
        self._texts: dict[int, tuple[Any, Any]] = {}  # id -> an object among the hyper-parameters, and its text

    def value(self, value: Any, path: str) -> Any:
        """A value as JSON.

        Args:
            value: anything.
            path: where it is in the checkpoint, for tensor names and errors.

        Raises:
            CheckpointError: if it holds something that cannot be stored as data.
        """
        return self._node(self._flattener.flatten(value), path)

    def entry(self, key: str, value: Any) -> Any:
        """An entry of a checkpoint as JSON, or that it is omitted."""
        if key in hyper_parameters.TYPES:
            is_config = isinstance(value, type) and value.__module__.partition(".")[0] == "omegaconf"
            return hyper_parameters.TYPE_NAME if is_config else _OMITTED
        return self._hyper_parameter(value, (key,)) if key in hyper_parameters.ENTRIES else self.value(value, key)

    def _hyper_parameter(self, value: Any, path: tuple[Any, ...]) -> Any:
        """A hyper-parameter as JSON: objects that cannot be stored as data as text, and listed in ``omitted``."""
        plain = hyper_parameters.as_plain(value)
        if not isinstance(plain, dict) and type(plain) not in (list, tuple):
            return self._value_or_text(plain, value, path)
        if self._depth == _MAX_DEPTH:
            raise RecursionError
        self._depth += 1
        try:
            if not isinstance(plain, dict):
                items = [self._hyper_parameter(item, (*path, i)) for i, item in enumerate(plain)]
                return items if type(plain) is list else {"t": items}
            tag = "a" if isinstance(plain, hyper_parameters.WithAttributes) else "d"
            keys = [self._value_or_text(key, key, (*path, "key")) for key in plain]
            values = [self._hyper_parameter(item, (*path, key)) for key, item in plain.items()]
            return {tag: [list(pair) for pair in zip(keys, values, strict=True)]}
        finally:
            self._depth -= 1

    def _value_or_text(self, plain: Any, value: Any, path: tuple[Any, ...]) -> Any:
        encoded = self._encoded
        before, name = len(encoded.tensors), ".".join(map(str, path))
        try:
            return self.value(plain, name)
        except CheckpointError:
            del encoded.tensors[before:], encoded.names[before:]
            self._first_at = {at: index for at, index in self._first_at.items() if index < before}
            self._others_at = {at: [i for i in some if i < before] for at, some in self._others_at.items()}
            encoded.omitted.append(f"{name} ({class_name(type(value))})")
            keys = [key if type(key) in (str, int) else str(key) for key in path]
            node = {"r": [keys, hyper_parameters.text_of(value)]}
            self._texts[id(value)] = (value, node)
            return node

    def _node(self, node: Any, path: str) -> Any:
        kind = type(node)
        if kind is TensorNode:
            return self._tensor(node, path)
        if node is None or kind in (bool, int, str):
            return node
        if kind is DictNode or kind is SequenceNode:
            if self._depth == _MAX_DEPTH:
                raise RecursionError
            self._depth += 1
            try:
                return self._dict(node, path) if kind is DictNode else self._sequence(node, path)
            finally:
                self._depth -= 1
        if kind is float:
            return node if math.isfinite(node) else {"f": repr(node)}
        return self._other(node.value if kind is ObjectNode else node, path)

    def _dict(self, node: DictNode, path: str) -> dict[str, Any]:
        pairs = [
            [key if type(key) is str else self.value(key, f"{path} key"), self._node(item, f"{path}.{key}")]
            for key, item in node.items
        ]
        if not issubclass(node.kind, OrderedDict):
            return {"d": pairs}
        if node.metadata is None:
            return {"o": pairs}
        return {"o": pairs, "m": self._node(node.metadata, f"{path}._metadata")}

    def _sequence(self, node: SequenceNode, path: str) -> Any:
        if node.kind not in _TAGS:
            raise _refusal(node.kind, path)
        items = [self._node(item, f"{path}.{i}") for i, item in enumerate(node.items)]
        tag = _TAGS[node.kind]
        if tag is None:
            return items
        return {tag: [items, node.maxlen] if tag == "q" else items}

    def _other(self, value: Any, path: str) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return self._numpy(value, path)
        if isinstance(value, str | int | float):  # an enum member, or another subclass: its plain value
            base = next(each for each in (str, int, float) if isinstance(value, each))
            return self._node(str.__str__(value) if base is str else base(value), path)
        if isinstance(value, bytes | complex | torch.dtype | torch.device | PurePath):
            return _scalar(value)
        if isinstance(value, Part):
            return {"T": self._part(value)}
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, deque):
            return self.value(deque(value, value.maxlen), path)
        if id(value) in self._texts:  # a module that saves its hyper-parameters once more, in an entry of its own
            return self._texts[id(value)][1]
        raise _refusal(type(value), path)

    def _numpy(self, value: np.ndarray[Any, Any] | np.generic, path: str) -> Any:
        if isinstance(value, np.generic):
            plain = value.item()
            if not isinstance(plain, np.generic):
                return self.value(plain, path)
        else:
            try:
                return {"N": self._add(torch.from_numpy(np.array(value)), path)}
            except (TypeError, ValueError):
                pass
        raise CheckpointError(f"checkpoint: {path} holds numpy {value.dtype}, which no tensor can; use another type")

    def _tensor(self, node: TensorNode, path: str) -> dict[str, Any]:
        if node.wrapper is not None:
            return {"W": self._wrapper(node, node.wrapper, path)}
        if node.is_sharded:
            raise CheckpointError(
                f"checkpoint: {path} is a DTensor, of which this process holds one part; only whole tensors can be "
                "stored. Gather it where the state is made (full_tensor), or let the strategy write the checkpoints"
            )
        tensor = self._flattener.tensors[node.first]
        problem = not_dense(tensor)
        if node.layout is not torch.strided:
            problem = f"Tensor of layout {node.layout} on {node.device}"
        if problem is not None:
            raise CheckpointError(f"checkpoint: {path} is a {problem}; only plain dense tensors can be stored")
        order = _memory_order(tensor)
        if order is not None:  # the bits of a product depend on it: SOAP's projections are transposed, for example
            return {"P": [self._add(tensor.permute(order), path), order]}
        return {"T": self._add(tensor, path)}

    def _wrapper(self, node: TensorNode, layout: WrapperLayout, path: str) -> dict[str, Any]:
        name = class_name(layout.kind)
        if registered_wrappers().get(name) is not layout.kind:
            raise CheckpointError(
                f"checkpoint: {path} is a tensor of class {name}, which may not be built from a file yet: import the "
                f"package that registers it, or call torch.serialization.add_safe_globals([{layout.kind.__name__}]), "
                "in the run that writes checkpoints and in those that read them"
            )
        if layout.stride is None or not all(type(each) is int for each in (*layout.size, *layout.stride)):
            raise CheckpointError(f"checkpoint: {path} is a {name} without a fixed size and stride; store its parts")
        return {
            "class": name,
            "inner": [
                [each, self._node(inner, f"{path}.{each}")]
                for each, inner in zip(layout.names, node.inner, strict=True)
            ],
            "context": self.value(layout.context, f"{path} context"),
            "size": list(layout.size),
            "stride": list(layout.stride),
        }

    def _part(self, part: Part) -> int:
        encoded = self._encoded
        if part.name not in encoded.parts:
            encoded.parts[part.name] = len(encoded.tensors)
            encoded.tensors.append(torch.empty(part.shape, dtype=part.dtype, device="meta"))
            encoded.names.append(part.name)
            self._used.add(part.name)
        return encoded.parts[part.name]

    def _add(self, tensor: Tensor, path: str) -> int:
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        encoded = self._encoded
        address, index = tensor.data_ptr(), len(encoded.tensors)
        if address not in self._first_at:
            self._first_at[address] = index
        elif tensor.numel():
            others = self._others_at.setdefault(address, [])
            for known in (self._first_at[address], *others):
                if _is_same(tensor, encoded.tensors[known]):
                    return known
            others.append(index)
        if path in self._used:
            path = f"{path}#{index}"
        self._used.add(path)
        encoded.tensors.append(tensor)
        encoded.names.append(path)
        return index


_OMITTED = object()


def _memory_order(tensor: Tensor) -> list[int] | None:
    """The dimensions in the order of the memory, if it is another one and there are no gaps in it; else None."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if tensor.permute(order).is_contiguous() else None


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors that begin at one address are the same elements."""
    mine, theirs = ((each.device, each.dtype, each.shape, each.stride()) for each in (one, other))
    return mine == theirs


def _refusal(kind: type, path: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: {path} is a {class_name(kind)}, and checkpoints hold only tensors and plain Python, since they "
        "are read as data. Turn it into plain values where the state is made (state_dict, on_save_checkpoint)"
    )


def _scalar(value: Any) -> dict[str, Any]:
    if isinstance(value, bytes):
        return {"b": base64.b64encode(value).decode()}
    if isinstance(value, complex):
        return {"c": [repr(value.real), repr(value.imag)]}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    return {"dtype": str(value).removeprefix("torch.")}
