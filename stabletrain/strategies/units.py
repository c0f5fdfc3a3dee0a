"""Which modules of an unmodified LightningModule become units of FSDP2: gathered as a whole, and freed again."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import NamedTuple, TypeAlias

from torch import nn

from stabletrain.errors import UserError
from stabletrain.runtime.internals.shards import class_name
from stabletrain.strategies.messages import worded

UnitFilter: TypeAlias = Callable[[str, nn.Module], bool]
"""Called with the name of a module and the module; True: it is a unit."""
Units: TypeAlias = str | type[nn.Module] | UnitFilter | Sequence[str | type[nn.Module]] | None

_SHARE = 0.5
"""Smallest share of the parameters in repeated blocks for which they are chosen by themselves."""
_LISTED = 12


class Choice(NamedTuple):
    """The units, and why they were chosen.

    Args:
        units: modules by name; an outer one comes before those in it. Empty: the module is one group.
        reason: by which of the rules they were found.
        share: of all parameters, those in units; 0 to 1.
    """

    units: dict[str, nn.Module]
    reason: str
    share: float

    def __str__(self) -> str:
        if not self.units:
            return f"one group, {self.reason}"
        names = list(self.units)
        listed = ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]}"
        return f"{len(names)} units with {self.share:.0%} of the parameters ({self.reason}): {listed}"


def choose(root: nn.Module, units: Units = None) -> Choice:
    """Choose the units of a module.

    The first of these rules that finds any: ``units``; the classes in ``_no_split_modules`` of the module or of modules
    in it, as Hugging Face models have it; the blocks of the outermost ``ModuleList`` and ``Sequential`` with at least
    two of one class, if blocks have children of their own and hold at least half of the parameters. A module of which
    a part is also used outside of it (tied weights) is never a unit.

    Args:
        root: the LightningModule, before it is sharded.
        units: class names, classes, patterns of names (``net.blocks.*``), or a function of name and module.

    Raises:
        UserError: if an entry of ``units`` finds nothing, or a module that shares a part with the rest.
    """
    named = {name: each for name, each in root.named_modules() if name}
    if units is not None:
        found = _given(root, named, units)
        return _choice(root, found, "as given")
    for reason, candidates in (("_no_split_modules", _named_by_model(root, named)), ("blocks", _blocks(root, named))):
        found = {name: named[name] for name in candidates if is_closed(root, named[name])}
        choice = _choice(root, found, reason)
        if found and (reason == "_no_split_modules" or choice.share >= _SHARE):
            return choice
    return Choice({}, "the module has no repeated blocks", 0.0)


def is_closed(root: nn.Module, unit: nn.Module) -> bool:
    """Whether no parameter and no module within a unit is also registered outside of it."""
    return _shared_part(root, unit) is None


def _shared_part(root: nn.Module, unit: nn.Module) -> str | None:
    """The name, outside of a unit, of a parameter or module that is also part of it."""
    inner = {id(each) for each in unit.modules()}
    owned = {id(p) for p in unit.parameters()}
    for name, module in root.named_modules():
        if id(module) in inner:
            continue
        for key, p in module._parameters.items():
            if id(p) in owned:
                return f"{name}.{key}" if name else key
        for key, child in module._modules.items():
            if child is not None and child is not unit and id(child) in inner:
                return f"{name}.{key}" if name else key
    return None


def _choice(root: nn.Module, units: dict[str, nn.Module], reason: str) -> Choice:
    return Choice(units, reason, _size(units.values()) / (_size([root]) or 1))


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for p in {id(p): p for each in modules for p in each.parameters()}.values())


def _given(root: nn.Module, named: dict[str, nn.Module], units: Units) -> dict[str, nn.Module]:
    several = isinstance(units, Sequence) and not isinstance(units, str)
    found: dict[str, nn.Module] = {}
    for entry in units if several else [units]:  # type: ignore[union-attr]
        matched = {name: each for name, each in named.items() if _matches(entry, name, each)}
        if not matched:
            raise UserError(worded(_nothing_found(root, named, entry)))
        found |= matched
    for name, module in found.items():
        if part := _shared_part(root, module):
            raise UserError(
                worded(
                    f"fsdp2: the unit {name} shares a part with the rest of the module ({part}), which would see it "
                    "while it is sharded. Leave it out of the units (config key strategy.units)"
                )
            )
    return {name: each for name, each in named.items() if name in found}


def _matches(entry: object, name: str, module: nn.Module) -> bool:
    if isinstance(entry, str):
        return class_name(module) == entry or fnmatch.fnmatchcase(name, entry)
    if isinstance(entry, type):
        return isinstance(module, entry)
    return bool(entry(name, module))  # type: ignore[operator]


def _nothing_found(root: nn.Module, named: dict[str, nn.Module], entry: object) -> str:
    classes = list(dict.fromkeys(class_name(each) for each in named.values() if any(True for _ in each.parameters())))
    text = f"fsdp2: no module of {class_name(root)} is chosen by {entry!r}"
    near = get_close_matches(entry, [*classes, *named], 1) if isinstance(entry, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"{text}{hint} (config key strategy.units). Expected class names or patterns of module names; classes here: "
        f"{', '.join(classes[:_LISTED])}{', ...' if len(classes) > _LISTED else ''}"
    )


def _named_by_model(root: nn.Module, named: dict[str, nn.Module]) -> list[str]:
    classes = {each for module in root.modules() for each in (getattr(module, "_no_split_modules", None) or ())}
    found = [name for name, each in named.items() if class_name(each) in classes]
    return [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]


def _blocks(root: nn.Module, named: dict[str, nn.Module]) -> list[str]:
    lists: list[str] = []
    found: list[str] = []
    names = {id(each): name for name, each in named.items()}
    for name, module in root.named_modules():
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in lists)
        if inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        kinds: dict[type, list[nn.Module]] = {}
        for child in module.children():
            if any(True for _ in child.children()):
                kinds.setdefault(type(child), []).append(child)
        blocks = max(kinds.values(), key=_size, default=[])
        if len(blocks) >= 2:
            lists.append(name)
            found += [names[id(block)] for block in blocks]
    return found
