"""A checkpoint as data: its tensors in a list, everything else as JSON that can only become plain Python again.

There is no pickle: reading a file can run no code. JSON objects are tagged containers, so that integer keys, tuples,
sets and non-finite numbers come back as what they were:

| Python | JSON |
|---|---|
| None, bool, int, str, finite float, list | itself |
| dict, ordered dict | `{"d": [[key, value], ...]}`, `{"o": ...}`; `"m"`: the versions in a module's state |
| tuple, set, frozenset, deque | `{"t": [...]}`, `{"s": [...]}`, `{"fs": [...]}`, `{"q": [[...], maxlen]}` |
| tensor, numpy array | `{"T": index}`, `{"N": index}` |
| inf and nan, complex, bytes | `{"f": "nan"}`, `{"c": [re, im]}`, `{"b": base64}` |
| torch dtype, device, size | `{"dtype": "bfloat16"}`, `{"device": "cpu"}`, `{"size": [...]}` |
| path | `{"path": "..."}` |

A tensor that appears in several places (tied weights) is stored once, and is one tensor again when it is read.
Subclasses come back as their base: an enum member as its value, a defaultdict as a dict, a parameter as a tensor.
"""

from __future__ import annotations

import base64
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabletrain.runtime.checkpoints.manifest import CheckpointError

_OPTIONAL = ("hyper_parameters", "datamodule_hyper_parameters", "hparams_type", "datamodule_hparams_type")
"""What only `load_from_checkpoint` needs: things in there that are not data are left out."""


class Encoded:
    """A checkpoint taken apart.

    Args:
        checkpoint: a dict, as Lightning's ``dump_checkpoint`` gives it.

    Raises:
        CheckpointError: if it holds something that cannot be stored as data; the message names the place.

    >>> packed = Encoded({"step": 3, "weights": torch.ones(2), "seen": (1, 2)})
    >>> packed.tree, packed.names
    ({'d': [['step', 3], ['weights', {'T': 0}], ['seen', {'t': [1, 2]}]]}, ['weights'])
    >>> decode(packed.tree, packed.tensors)
    {'step': 3, 'weights': tensor([1., 1.]), 'seen': (1, 2)}
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.omitted: list[str] = []
        """What was left out of the hyper-parameters, each as a text."""
        self._seen: dict[tuple[Any, ...], int] = {}
        self._used = {"__metadata__"}  # the one name that the tensor file keeps for itself
        pairs = []
        for key, value in checkpoint.items():
            try:
                kept = self._without_objects(value, key) if key in _OPTIONAL else self._node(value, str(key))
            except RecursionError:
                raise CheckpointError(
                    f"checkpoint: {key} holds a container that is in itself, or is too deep"
                ) from None
            if kept is not _NOTHING:
                pairs.append([self._node(key, "key"), kept])
        self.tree: dict[str, Any] = {"d": pairs}

    def _node(self, value: Any, place: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"f": repr(value)}
        if isinstance(value, Tensor):
            return {"T": self._tensor(value, place)}
        if isinstance(value, dict):
            return self._dict(value, place)
        if kind is list:
            return self._items(value, place)
        if isinstance(value, np.ndarray | np.generic):
            return self._numpy(value, place)
        if isinstance(value, str | int | float):  # an enum member, or another subclass: its plain value
            plain = next(base for base in (str, int, float) if isinstance(value, base))
            return self._node(str.__str__(value) if plain is str else plain(value), place)
        if isinstance(value, bytes | complex | torch.dtype | torch.device | PurePath):
            return _scalar(value)
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, deque):
            return {"q": [self._items(value, place), value.maxlen]}
        for tag, base in (("t", tuple), ("s", set), ("fs", frozenset)):
            if kind is base:
                return {tag: self._items(value, place)}
        raise CheckpointError(
            f"checkpoint: {place} is a {kind.__module__}.{kind.__qualname__}, and checkpoints hold only tensors and "
            "plain Python, since they are read as data. Turn it into plain values where the state is made "
            "(state_dict, on_save_checkpoint)"
        )

    def _items(self, values: Any, place: str) -> list[Any]:
        return [self._node(item, f"{place}.{i}") for i, item in enumerate(values)]

    def _dict(self, value: dict[Any, Any], place: str) -> dict[str, Any]:
        pairs = [[self._node(key, f"{place} key"), self._node(item, f"{place}.{key}")] for key, item in value.items()]
        if not isinstance(value, OrderedDict):
            return {"d": pairs}
        metadata = getattr(value, "_metadata", None)
        return {"o": pairs} if metadata is None else {"o": pairs, "m": self._node(metadata, f"{place}._metadata")}

    def _numpy(self, value: np.ndarray[Any, Any] | np.generic, place: str) -> Any:
        if isinstance(value, np.generic):
            plain = value.item()
            if not isinstance(plain, np.generic):
                return self._node(plain, place)
        else:
            try:
                return {"N": self._tensor(torch.from_numpy(np.array(value)), place)}
            except (TypeError, ValueError):
                pass
        raise CheckpointError(f"checkpoint: {place} holds numpy {value.dtype}, which no tensor can; use another type")

    def _tensor(self, tensor: Tensor, place: str) -> int:
        wrapped = hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "to_local")
        if wrapped or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            what = f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"
            raise CheckpointError(f"checkpoint: {place} is a {what}; only plain dense tensors can be stored")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        same = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        index = self._seen.get(same) if tensor.numel() else None
        if index is None:
            index = self._seen[same] = len(self.tensors)
            name = place if place not in self._used else f"{place}#{index}"
            self._used.add(name)
            self.tensors.append(tensor)
            self.names.append(name)
        return index

    def _without_objects(self, value: Any, place: str) -> Any:
        """Hyper-parameters as data: what is no data is left out, key by key, and noted."""
        omegaconf = sys.modules.get("omegaconf")
        if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
            value = omegaconf.OmegaConf.to_container(value, resolve=True, throw_on_missing=False)
        if isinstance(value, dict):
            kept = [
                (self._node(key, place), self._without_objects(item, f"{place}.{key}")) for key, item in value.items()
            ]
            return {"d": [[key, item] for key, item in kept if item is not _NOTHING]}
        before = len(self.tensors)
        try:
            return self._node(value, place)
        except CheckpointError:
            del self.tensors[before:], self.names[before:]
            self._seen = {same: index for same, index in self._seen.items() if index < before}
            if not isinstance(value, type):
                self.omitted.append(f"{place} ({type(value).__module__}.{type(value).__qualname__})")
            return _NOTHING


_NOTHING = object()


def decode(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `Encoded`.

    Args:
        tree: its tree.
        tensors: its tensors, or equal ones.

    Raises:
        CheckpointError: if the tree has a tag that this version does not know.
    """
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag, value = next(iter(tree.items()))
    if tag == "T":
        return tensors[value]
    if tag == "N":
        return tensors[value].numpy()
    if tag == "d":
        return {decode(key, tensors): decode(item, tensors) for key, item in value}
    if tag == "o":
        ordered = OrderedDict((decode(key, tensors), decode(item, tensors)) for key, item in value)
        if "m" in tree:
            ordered._metadata = decode(tree["m"], tensors)  # type: ignore[attr-defined]
        return ordered
    if tag == "q":
        return deque(decode(value[0], tensors), maxlen=value[1])
    if tag in _COLLECTIONS:
        return _COLLECTIONS[tag](decode(value, tensors))
    if tag in _SCALARS:
        return _SCALARS[tag](value)
    raise CheckpointError(f"checkpoint: unknown kind of value {tag!r}; a newer stabletrain wrote it: update this one")


_COLLECTIONS: dict[str, Any] = {"t": tuple, "s": set, "fs": frozenset, "size": torch.Size}
_SCALARS: dict[str, Any] = {
    "f": float,
    "c": lambda parts: complex(*map(float, parts)),
    "b": base64.b64decode,
    "path": Path,
    "device": torch.device,
    "dtype": lambda name: dtype_of(name),
}


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


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name such as ``bfloat16``.

    Raises:
        CheckpointError: if torch has no such dtype.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"checkpoint: this version of torch has no dtype {name!r}")
    return found
