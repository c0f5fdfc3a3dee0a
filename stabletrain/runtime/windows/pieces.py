"""A batch in pieces along its rows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stabletrain.errors import UserError
from stabletrain.runtime.windows.batches import tensors_of


def rows(batch: Any) -> int:
    """The first dimension of the first tensor; 0 if there is none."""
    return next((len(each) for each in tensors_of(batch) if each.ndim), 0)


def split(batch: Any, pieces: int, name: str) -> list[tuple[Any, int]]:
    """The pieces of a batch, as equal as possible, each with its number of rows.

    Tensors, and lists of numbers or texts, are split along the first dimension; what has none is in every piece.

    Args:
        batch: of tensors, mappings, lists, tuples and dataclasses.
        pieces: at most as many as there are rows are made.
        name: the plugin, for messages.

    Raises:
        UserError: if the batch has something else, or a tensor without one row for each of the others'.
    """
    total = rows(batch)
    if not total:
        raise UserError(f"{name}: expected a batch with tensors that have rows, got {type(batch).__name__}")
    number = min(pieces, total)
    sizes = [total // number + (i < total % number) for i in range(number)]
    ends = [sum(sizes[: i + 1]) for i in range(number)]
    return [(_rows_of(batch, end - size, end, total, name), size) for size, end in zip(sizes, ends, strict=True)]


def _rows_of(value: Any, first: int, end: int, total: int, name: str) -> Any:
    def part(each: Any) -> Any:
        return _rows_of(each, first, end, total, name)

    if isinstance(value, Tensor):
        if not value.ndim:
            return value
        if len(value) == total:
            return value[first:end]
        raise UserError(
            f"{name}: cannot split a batch in which one tensor has {total} rows and another has the shape "
            f"{tuple(value.shape)}. Expected the same first dimension everywhere"
        )
    if value is None or isinstance(value, int | float | str | bytes):
        return value
    if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__setitem__")):
        found = copy.copy(value)
        for key in list(value.keys()):
            found[key] = part(value[key])
        return found
    if isinstance(value, list | tuple):
        if len(value) == total and all(isinstance(each, int | float | str | bytes) for each in value):
            return value[first:end]
        parts = [part(each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: part(getattr(value, f.name)) for f in dataclasses.fields(value)})
    raise UserError(
        f"{name}: cannot split a batch that contains {type(value).__name__}. Expected tensors, mappings, lists, tuples "
        "and dataclasses of them"
    )
