"""Objects in attributes of modules that hold tensors which cannot be kept: found, so that the user is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

from stabletrain.runtime.hidden.contents import is_container, tensors_in
from stabletrain.runtime.internals.attributes import names_of, version_of

_KEPT_ELSEWHERE = (torch.Tensor, Optimizer, LRScheduler, Metric, MetricCollection, type)
_TRAINERS = ("lightning.", "pytorch_lightning.", "stabletrain")
_EXAMINED = 64


class OpaqueState:
    """Compares objects with how they were at the last look; one that has changed is told of once."""

    def __init__(self) -> None:
        self._before: dict[str, list[Any]] = {}
        self._changed: list[str] = []
        self._told: set[str] = set()

    def look(self, values: Iterable[tuple[str, Any]]) -> None:
        """Look at attributes.

        Args:
            values: paths and values of attributes.
        """
        for path, value in values:
            if path in self._told:
                continue
            now = [mark for each in _objects(value) for mark in _marks(each)]
            if path in self._before and self._before[path] != now:
                self._changed.append(path)
                self._told.add(path)
            self._before[path] = now

    def news(self) -> list[str]:
        """The paths of objects that were found changed since the last call."""
        changed, self._changed = self._changed, []
        return changed


def _objects(value: Any) -> Iterator[Any]:
    """The objects in a value that are neither tensors nor containers."""
    if is_container(value) or isinstance(value, tuple):
        items = list(value.values()) if isinstance(value, dict) else list(value)
        for each in items[:_EXAMINED]:
            if not is_container(each):
                yield from _objects(each)
    elif not isinstance(value, _KEPT_ELSEWHERE) and not type(value).__module__.startswith(_TRAINERS):
        yield value


def _marks(value: Any) -> Iterator[Any]:
    """What changes when an object's tensors, or the position of a generator, do."""
    if isinstance(value, torch.Generator):
        yield bytes(value.get_state().numpy().tobytes())
    elif isinstance(value, nn.Module):  # one that is no submodule, as in a list
        yield from ((id(each), version_of(each)) for each in (*value.parameters(), *value.buffers()))
    else:
        for each in names_of(value).values() if not callable(value) or hasattr(value, "__dict__") else ():
            yield from ((id(tensor), version_of(tensor)) for tensor in tensors_in(each))
