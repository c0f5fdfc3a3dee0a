"""What a batch holds: how many elements of it count in a mean loss, its rows, and pieces of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stabletrain.errors import UserError
from stabletrain.runtime.records.event_log import logger

Count: TypeAlias = Callable[[Any], Any] | str | int | None
"""What to count in a batch: a function of the batch, the name or position of an entry, or None for rows."""
_TOKENS = (torch.int32, torch.int64)


def check_count(count: Any, ignore_index: Any, require: Callable[[bool, str, str, object], None]) -> None:
    """Check the arguments of `BatchCount`, before there is a batch.

    Args:
        count: what the user gives.
        ignore_index: what the user gives.
        require: raises an error unless the first argument is true; the others are the name of the argument, the valid
            values, and the value.
    """
    known = count is None or callable(count) or (isinstance(count, str | int) and not isinstance(count, bool))
    require(known, "count", "a function of the batch, a key, attribute or position of an entry, or null", count)
    whole = ignore_index is None or (isinstance(ignore_index, int) and not isinstance(ignore_index, bool))
    require(whole, "ignore_index", "a whole number, or null", ignore_index)


class BatchCount:
    """The number of elements of a batch over which the module's mean loss is a mean.

    Args:
        count: a function of the batch that returns a whole number; the key, attribute or position of an entry, of which
            the elements other than ``ignore_index`` are counted; None: the rows of the first tensor.
        ignore_index: elements with this value do not count; None: all count.
        setting: the config key of ``count``, to begin messages with.
    """

    def __init__(self, count: Count, ignore_index: int | None, setting: str) -> None:
        self._count, self._ignored, self._setting = count, ignore_index, setting
        self._told = False

    def __call__(self, batch: Any, tells: bool = False) -> int:
        """Count.

        Args:
            batch: as the module gets it.
            tells: log once what is counted, if nobody has said it.

        Raises:
            UserError: the batch has no such entry or no tensor, or the function does not return a whole number >= 0.
        """
        if callable(self._count):
            return self._whole(self._count(batch))
        if self._count is None:
            if not any(each.ndim for each in tensors_of(batch)) and _is_plain(batch):
                return 1  # one row of plain numbers
            first = self._first(batch)
            if tells and not self._told:
                self._told = True
                shape = tuple(first.shape)
                logger.warning(
                    "%s is not given: what counts is the first dimension of the first tensor (%d of shape %s). Of a "
                    "loss that is a mean over tokens give the name of the labels, or a function of the batch",
                    *(self._setting, len(first), shape),
                )
            return len(first)
        entry = self._entry(batch)
        if not isinstance(entry, Tensor):
            raise UserError(
                f"{self._setting}: expected a tensor in the batch's entry {self._count!r}, got "
                f"{type(entry).__name__}. Name the labels, or give a function of the batch"
            )
        return entry.numel() if self._ignored is None else int((entry != self._ignored).sum())

    def _first(self, batch: Any) -> Tensor:
        first = next((each for each in tensors_of(batch) if each.ndim), None)
        if first is None:
            raise UserError(
                f"{self._setting}: the batch is {_described(batch)}, without a tensor whose rows could be counted. "
                "Give a function of the batch that returns a whole number"
            )
        return first

    def _entry(self, batch: Any) -> Any:
        key: Any = self._count
        try:
            return getattr(batch, key) if isinstance(key, str) and not _has_keys(batch) else batch[key]
        except (AttributeError, KeyError, IndexError, TypeError):
            raise UserError(
                f"{self._setting}: the batch has no entry {key!r}; it is {_described(batch)}. Give the key, attribute "
                "or position of the labels, or a function of the batch"
            ) from None

    def _whole(self, found: Any) -> int:
        number = found
        if isinstance(found, Tensor | np.generic | np.ndarray):
            device, numbers = str(getattr(found, "device", "cpu")), math.prod(found.shape)
            number = found.item() if numbers == 1 and device != "meta" else found
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            return number
        got = f"{found!r} of type {type(found).__name__}"
        if isinstance(found, Tensor):
            got = f"a tensor of shape {tuple(found.shape)} and {found.dtype} on {found.device}"
            got += f" ({number!r})" if number is not found else ""
        raise UserError(
            f"{self._setting}: expected a function that returns a whole number >= 0 (an int, or an integer tensor with "
            f"one element), got {got}. For example: lambda batch: int((batch['labels'] != -100).sum())"
        )


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch in order, within mappings, lists, tuples and dataclasses."""
    if isinstance(batch, Tensor):
        yield batch
    elif _has_keys(batch):
        for key in batch.keys():  # noqa: SIM118 (BatchEncoding iterates over its keys, others over rows)
            yield from tensors_of(batch[key])
    elif isinstance(batch, list | tuple):
        for each in batch:
            yield from tensors_of(each)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensors_of(getattr(batch, field.name))


def samples_and_tokens(batch: Any) -> tuple[int | None, int | None]:
    """The rows of a batch's first tensor, and its elements if it is a matrix of whole numbers, as of token ids.

    Args:
        batch: as the module gets it.

    Returns:
        None for what is not known: a batch without a tensor, or one without tokens.
    """
    with suppress(Exception):  # a tensor without a size, as nested ones are, has nothing to count and is no error
        first = next((each for each in tensors_of(batch) if each.ndim), None)
        if first is not None:
            return len(first), first.numel() if first.ndim == 2 and first.dtype in _TOKENS else None
    return None, None


def _has_keys(batch: Any) -> bool:
    return isinstance(batch, Mapping) or (hasattr(batch, "keys") and hasattr(batch, "__getitem__"))


def _is_plain(batch: Any) -> bool:
    """Whether a batch is made of numbers and texts."""
    if _has_keys(batch):
        return all(_is_plain(batch[key]) for key in batch.keys())  # noqa: SIM118
    if isinstance(batch, list | tuple):
        return all(map(_is_plain, batch))
    return batch is None or isinstance(batch, int | float | str | Tensor)


def _described(batch: Any) -> str:
    """What a batch is, for messages."""
    if _has_keys(batch):
        return f"{type(batch).__name__} with {', '.join(map(repr, batch.keys()))}"
    if isinstance(batch, list | tuple):
        return f"{type(batch).__name__} of {', '.join(type(each).__name__ for each in batch[:6]) or 'nothing'}"
    return type(batch).__name__
