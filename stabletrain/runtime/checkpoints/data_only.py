"""What a checkpoint file cannot hold as data: found when it is saved, and not when a run resumes from it."""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.snapshots.tensor_kinds import PLAIN, class_name, registered_wrappers

_DATA = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (dict, OrderedDict, list, tuple, set)


class Refused(NamedTuple):
    """A value that ``torch.load(weights_only=True)`` refuses.

    Args:
        path: its keys in the state, joined by dots.
        kind: its class.
    """

    path: str
    kind: str


def refused_in(state: Mapping[str, Any]) -> Refused | None:
    """The first value in the state of an optimizer that ``torch.load(weights_only=True)`` refuses; None: it takes all.

    Tensors of plain classes are not written for it, and of each other class one value is.

    Args:
        state: from ``state_dict``.
    """
    known: dict[type, bool] = {}
    for path, value in _others(state, ""):
        kind = type(value)
        if kind not in known:
            known[kind] = _is_refused(value)
        if known[kind]:
            return Refused(path, class_name(kind))
    return None


@contextlib.contextmanager
def naming_optimizers(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Add the class of the optimizer to an error about something in its state.

    Args:
        optimizers: of the run, in the order of their states in a checkpoint.
    """
    try:
        yield
    except CheckpointError as error:
        for i, each in enumerate(optimizers):
            if f"optimizer_states.{i}." in str(error):
                raise CheckpointError(
                    f"the state of the optimizer {type(each).__name__} cannot be saved, so no run could resume from "
                    f"the checkpoint: {error}. Or use another optimizer"
                ) from error
        raise


def _others(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values that are neither plain tensors nor data, each with its path."""
    if type(value) in _CONTAINERS:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _others(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, Tensor):
        if type(value) not in PLAIN and type(value) not in registered_wrappers().values():
            yield path, value
    elif type(value) not in _DATA:
        yield path, value


def _is_refused(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # pickling runs code of the class
        return True
    return False
