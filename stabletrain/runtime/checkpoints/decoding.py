"""Decode what `encoding` wrote: plain Python objects from JSON and tensors; nothing in them can run code."""

from __future__ import annotations

import base64
from collections import OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabletrain.runtime.checkpoints.manifest import CheckpointError
from stabletrain.runtime.snapshots.tensor_kinds import WrapperLayout, registered_wrappers


def decode(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `Encoded` in `encoding`.

    Args:
        tree: its tree.
        tensors: its tensors, or equal ones.

    Raises:
        CheckpointError: if the tree has a tag that this version does not know, or a tensor of a class that this process
            has not declared safe.
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
    if tag == "W":
        return _decode_wrapper(value, tensors)
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


def _decode_wrapper(value: Any, tensors: Sequence[Tensor]) -> Tensor:
    kind = registered_wrappers().get(value["class"])
    if kind is None:
        raise CheckpointError(
            f"checkpoint: it holds a tensor of class {value['class']}, which this process has not declared safe to "
            "build from a file: before reading, import the package that registers it, or call "
            "torch.serialization.add_safe_globals with the class"
        )
    names = tuple(name for name, _ in value["inner"])
    context = decode(value["context"], tensors)
    layout = WrapperLayout(kind, names, context, torch.Size(value["size"]), tuple(value["stride"]))
    return layout.build([decode(inner, tensors) for _, inner in value["inner"]])


_COLLECTIONS: dict[str, Any] = {"t": tuple, "s": set, "fs": frozenset, "size": torch.Size}
_SCALARS: dict[str, Any] = {
    "f": float,
    "c": lambda parts: complex(*map(float, parts)),
    "b": base64.b64decode,
    "path": Path,
    "device": torch.device,
    "dtype": lambda name: dtype_of(name),
}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name such as ``bfloat16``.

    Raises:
        CheckpointError: if torch has no such dtype.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"checkpoint: this version of torch has no dtype {name!r}")
    return found
