"""Messages of the strategies: with the argument for a script, and with the config key for a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stabletrain import settings
from stabletrain.errors import UserError, require
from stabletrain.runtime.internals.shards import class_name

OWNER = "FSDP2Strategy"
"""The class that has the arguments which messages name."""
_MIXED = "got mixed torch.Tensor and DTensor"
_DEPTH = 50
"""Operations that are followed from a tensor back to the parameter that it was computed from."""


def worded(text: str) -> str:
    """A message with each config key as an argument of the strategy, unless its reader has a config."""
    return settings.worded(text, "strategy", OWNER)


def check(ok: bool, argument: str, expected: str, got: object) -> None:
    """Raise an error that names an argument of the strategy, unless it is valid.

    Args:
        ok: whether it is valid.
        argument: its name.
        expected: the valid values; follows "must be".
        got: the value.

    Raises:
        UserError: unless ``ok``.
    """
    require(ok, "fsdp2", argument, expected, got, "strategy", OWNER)


def translated(error: Exception, root: nn.Module, units: dict[str, nn.Module]) -> UserError | None:
    """What an error of a step means if it comes from a sharded parameter that was used as a whole one; else None.

    Args:
        error: raised in a step.
        root: the sharded LightningModule.
        units: by name.
    """
    if _MIXED not in str(error):
        return None
    name = _touched(error, root)
    unit = next((each for each in reversed(units) if name is not None and name.startswith(f"{each}.")), None)
    if unit is not None:
        what = f"{name}, a parameter of the unit {unit} ({class_name(units[unit])}), was"
        without = unit
    elif name is not None:
        what, without = f"the parameter {name} was", name
    else:
        what, without = "a parameter of a unit was", "the unit"
    return UserError(
        worded(
            f"fsdp2: {what} used outside of the unit's forward, where each process has a part of it only: in a penalty "
            f"on weights, or by calling another method than forward. Choose units without {without} (config key "
            "strategy.units), or compute it within the forward of the unit"
        )
    )


def _touched(error: BaseException, root: nn.Module) -> str | None:
    """The name of the sharded parameter that an error is about, from what the failed calls were working on."""
    names = {id(p): name for name, p in root.named_parameters()}
    modules = {id(each): name for name, each in root.named_modules()}
    frames = list(_frames(error))[::-1]
    for frame in frames:
        for value in _tensors(list(frame.f_locals.values())):
            if (name := _leaf(value, names)) is not None:
                return name
    for frame in frames:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and modules.get(id(owner)):
            for key, p in owner.named_parameters():
                if isinstance(p, DTensor):
                    return f"{modules[id(owner)]}.{key}"
    return None


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _tensors(value: Any, depth: int = 3) -> Iterator[DTensor]:
    if isinstance(value, DTensor):
        yield value
    elif isinstance(value, list | tuple) and depth:
        for each in value:
            yield from _tensors(each, depth - 1)
    elif isinstance(value, dict) and depth:
        yield from _tensors(list(value.values()), depth - 1)


def _leaf(tensor: Tensor, names: dict[int, str]) -> str | None:
    """The name of the first parameter from which a tensor was computed."""
    if id(tensor) in names:
        return names[id(tensor)]
    left: list[Any] = [tensor.grad_fn]
    for _ in range(_DEPTH):
        if not left:
            return None
        function = left.pop()
        if function is None:
            continue
        variable = getattr(function, "variable", None)
        if variable is not None and id(variable) in names:
            return names[id(variable)]
        left += [each for each, _ in function.next_functions]
    return None
