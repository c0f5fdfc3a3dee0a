"""Move a learning-rate scheduler from one optimizer to another, whose groups are parts of the first one's groups."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_RATES = frozenset({"base_lrs", "max_lrs", "min_lrs", "_last_lr"})
"""Attributes of torch's schedulers with one rate for each group."""
_OTHERS = frozenset({"lr_lambdas", "base_momentums", "max_momentums"})
"""Those with one other value for each group."""
_OF_ALL = frozenset({"_milestones", "_schedulers", "_schedule_phases", "milestones"})
"""Lists of torch's schedulers that are not about groups, whatever their length."""
_LIMITS = frozenset({"eta_min", "default_min_lr"})
"""Rates that all groups share."""
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Rates that torch's schedulers write into parameter groups."""


@dataclass(frozen=True)
class RateChange:
    """How learning rates change: from one base rate to another, and by a factor.

    Args:
        before: base rate of the replaced optimizer.
        after: base rate of the new one; equal to ``before``: the rates stay.
        scale: further factor.
    """

    before: float = 1.0
    after: float = 1.0
    scale: float = 1.0

    def __call__(self, rate: Any) -> Any:
        """The changed rate as a number, also of one that a tensor holds, which groups must not share."""
        value = float(rate) if isinstance(rate, Tensor) else rate
        if self.after != self.before:  # the base rate itself becomes the new one, to the last bit
            value = self.after if value == self.before else value * (self.after / self.before)
        return value if self.scale == 1 else value * self.scale

    def of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The changed rates of a parameter group: ``lr``, and what schedulers have written into it."""
        return {name: self(group[name]) for name in _GROUP_RATES if name in group}


def retarget(
    scheduler: Any, old: Optimizer, new: Optimizer, parents: Sequence[int], changes: Sequence[RateChange]
) -> str | None:
    """Attach a scheduler, with the schedulers in it, to another optimizer, in place.

    Args:
        scheduler: of torch, or one with the same attributes.
        old: its optimizer.
        new: the other one, whose groups have changed rates of the old one's.
        parents: for each group of the new optimizer, the index of the group of the old one that it is a part of.
        changes: for each group of the new optimizer, how its rates have changed.

    Returns:
        Why it cannot be attached, and then nothing was changed; None: it was.
    """
    found = list(_nested(scheduler, []))
    count = len(old.param_groups)
    is_same = list(parents) == list(range(count))
    for each in found:
        if problem := _problem(each, old, new, count, is_same=is_same):
            return problem
    for each in found:
        for name, value in list(vars(each).items()):
            if value is old:
                setattr(each, name, new)
            elif name in _RATES and _has_each(value, count):
                rates = [change(value[parent]) for parent, change in zip(parents, changes, strict=True)]
                setattr(each, name, type(value)(rates))
            elif name in _OTHERS and _has_each(value, count):
                setattr(each, name, type(value)(value[parent] for parent in parents))
            elif name in _LIMITS and value is not None:
                setattr(each, name, replace(changes[0], scale=1.0)(value))
    return None


def mark_step(optimizer: Optimizer) -> None:
    """Let torch's schedulers count the steps of an optimizer that they were not made for; they warn otherwise.

    A scheduler's constructor does this. This one keeps the rates as they are.
    """
    _KeepRates(optimizer)


class _KeepRates(LRScheduler):
    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]


def _nested(scheduler: Any, seen: list[Any]) -> Iterator[Any]:
    """A scheduler and those that it holds in its attributes, each once."""
    if any(scheduler is each for each in seen):
        return
    seen.append(scheduler)
    yield scheduler
    for value in vars(scheduler).values():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, LRScheduler):
                yield from _nested(each, seen)


def _problem(scheduler: Any, old: Optimizer, new: Optimizer, count: int, *, is_same: bool) -> str | None:
    name = type(scheduler).__name__
    if getattr(scheduler, "cycle_momentum", False):
        key = "betas" if getattr(scheduler, "use_beta1", False) else "momentum"
        if key not in new.defaults:
            return f"{name} cycles {key!r}, which {type(new).__name__} has not: set cycle_momentum=False in it"
    for attribute, value in vars(scheduler).items():
        if attribute in _OF_ALL:
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            if _refers_to(each, old):
                return f"its attribute {attribute!r} refers to the optimizer that is replaced"
        known = attribute in _RATES | _OTHERS
        if is_same or known:
            if known and isinstance(value, Sequence) and len(value) != count:
                return f"{name}.{attribute} has {len(value)} values for {count} groups"
            continue
        if _has_each(value, count) or _is_keyed_by(value, old):
            return (
                f"{name}.{attribute} ({type(value).__name__}) may hold one value for each of the {count} groups, and "
                "no class of torch has it"
            )
    return None


def _has_each(value: Any, count: int) -> bool:
    """Whether a value is a sequence with one element for each group."""
    if isinstance(value, Tensor):
        return value.ndim == 1 and len(value) == count
    return not isinstance(value, str | bytes | dict | set) and hasattr(value, "__len__") and len(value) == count


def _is_keyed_by(value: Any, optimizer: Optimizer) -> bool:
    """Whether the keys of a dictionary are the groups' indices or parameters, or its values the groups."""
    if not isinstance(value, dict) or not value:
        return False
    groups = optimizer.param_groups
    indices = set(value) <= set(range(len(groups))) if all(type(key) is int for key in value) else False
    return (
        indices
        or any(isinstance(key, Tensor) for key in value)
        or any(each is group for each in value.values() for group in groups)
    )


def _refers_to(value: Any, optimizer: Optimizer) -> bool:
    """Whether a function uses an optimizer, or an object in a list is it or one of its groups."""
    groups = optimizer.param_groups
    if isinstance(value, dict):
        return any(value is group for group in groups) or any(each is optimizer for each in value.values())
    if isinstance(value, functools.partial):
        given = [value.func, *value.args, *value.keywords.values()]
        return any(each is optimizer or _refers_to(each, optimizer) for each in given)
    if isinstance(value, types.MethodType) and value.__self__ is optimizer:
        return True
    cells = getattr(value, "__closure__", None) or ()
    return any(_content(cell) is optimizer or _content(cell) is groups for cell in cells)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not set yet
        return None
