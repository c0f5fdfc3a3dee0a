"""A tensor-parallel plan: which layers of a module are cut over the ranks, and how; checked without communication."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from stabletrain.errors import UserError

STYLES = {
    "colwise": "a Linear layer whose outputs are divided over the ranks",
    "colwise:N": "a fused Linear layer: N matrices one below the other, each divided, as q, k and v are in one layer",
    "rowwise": "a Linear layer whose inputs are divided; its output is summed over the ranks",
    "partial": "whole parameters between the two, of which a rank's gradient covers its part only",
    "divide": "an integer attribute of a module, such as its number of heads",
}


@dataclass(frozen=True)
class Assignment:
    """What a plan says about one module.

    Args:
        colwise: by name of a Linear layer, the number of matrices in it, which are all cut by rows.
        rowwise: names of the Linear layers that are cut by columns.
        partial: names of the parameters whose gradients are summed over the ranks.
        divided: names of the attributes that are divided by the number of ranks.
    """

    colwise: dict[str, int] = field(default_factory=dict)
    rowwise: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    divided: list[str] = field(default_factory=list)


def plan_of(module: nn.Module, plan: Mapping[str, str] | None, owner: str) -> Mapping[str, str]:
    """Return the plan that applies to a module: the given one, else its own ``tensor_parallel_plan``.

    Args:
        module: that is trained.
        plan: the argument of the strategy.
        owner: name of the strategy's class, for messages.

    Raises:
        UserError: if there is none.
    """
    found = getattr(module, "tensor_parallel_plan", None) if plan is None else plan
    if not isinstance(found, Mapping) or not found:
        raise UserError(
            f"{owner}: {type(module).__name__} has no attribute tensor_parallel_plan, and no plan was given. Say which "
            f"layers are cut: {owner}(plan={{'blocks.*.mlp.0': 'colwise', 'blocks.*.mlp.2': 'rowwise'}}) (config key "
            "strategy.strategy.plan; docs/tensor_parallel.md), or use strategy=ddp"
        )
    return found


def assign(module: nn.Module, plan: Mapping[str, str], degree: int, owner: str) -> Assignment:
    """Return which layers, parameters and attributes of a module a plan names.

    Patterns are compared part by part: ``*`` stands for one part of a name, or a piece of it.

    Args:
        module: not yet sharded; names are relative to it.
        plan: pattern -> style, see `STYLES`.
        degree: number of ranks over which layers are cut.
        owner: name of the strategy's class, for messages.

    Raises:
        UserError: for an unknown style, a pattern without a match, a layer of another kind, one with two styles, one
            that shares its weight with another, or a size that ``degree`` does not divide.
    """
    modules = {name: each for name, each in module.named_modules() if name}
    found, styles = Assignment(), dict[str, str]()
    for pattern, style in plan.items():
        where = f"{owner}(plan={{{pattern!r}: {style!r}}})"
        kind, stacked = _style(style, where)
        if kind == "divide":
            names = _attributes(modules, pattern)
        elif kind == "partial":
            names = [name for name, _ in module.named_parameters() if _matches(_within(name, pattern), pattern)]
            names = names or [name for name in modules if _matches(name, pattern)]  # without parameters here
        else:
            names = [name for name in modules if _matches(name, pattern)]
        if not names:
            raise UserError(f"{where}: {_nothing(module, modules, pattern, kind)}")
        for name in names:
            if styles.setdefault(name, style) != style:
                raise UserError(f"{where}: {name} has the style {styles[name]!r} by another pattern of the plan")
            if kind == "divide":
                _check_attribute(modules, name, degree, where)
                found.divided.append(name)
            elif kind == "partial":
                found.partial.extend([name] if name not in modules else [])
            else:
                _check_layer(modules[name], name, kind, stacked, degree, where)
                if kind == "colwise":
                    found.colwise[name] = stacked
                else:
                    found.rowwise.append(name)
    _check_shared(module, [*found.colwise, *found.rowwise], owner)
    return found


def _style(style: object, where: str) -> tuple[str, int]:
    """The kind of a style, and the number of matrices in the layer."""
    match = re.fullmatch(r"(colwise|rowwise|partial|divide)|colwise:([1-9]\d*)", str(style))
    if match is None:
        listed = "; ".join(f"{name!r}: {text}" for name, text in STYLES.items())
        raise UserError(f"{where}: expected one of the styles {listed}")
    return match[1] or "colwise", int(match[2] or 1)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _within(parameter: str, pattern: str) -> str:
    """As many parts of a parameter's name as the pattern has: the name of a module, or its own."""
    return ".".join(parameter.split(".")[: pattern.count(".") + 1])


def _attributes(modules: Mapping[str, nn.Module], pattern: str) -> list[str]:
    owner, _, attribute = pattern.rpartition(".")
    return [
        f"{name}.{key}"
        for name, each in modules.items()
        if _matches(name, owner)
        for key in vars(each)
        if fnmatchcase(key, attribute)
    ]


def _nothing(module: nn.Module, modules: Iterable[str], pattern: str, kind: str) -> str:
    """What to say of a pattern that matches nothing."""
    what = {"divide": "attribute", "partial": "module or parameter"}.get(kind, "module")
    near = get_close_matches(pattern, {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules}, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near and kind != "divide" else ""
    return (
        f"no {what} of {type(module).__name__} has such a name{hint} (config key strategy.strategy.plan). Names are "
        "those of named_modules(); a * stands for one part between two dots"
    )


def _check_attribute(modules: Mapping[str, nn.Module], name: str, degree: int, where: str) -> None:
    owner, _, attribute = name.rpartition(".")
    value = getattr(modules[owner], attribute)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: expected {name} to be an integer, got {value!r}")
    _check_divides(name, value, degree, where)


def _check_layer(layer: nn.Module, name: str, kind: str, stacked: int, degree: int, where: str) -> None:
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"{where}: expected {name} to be an nn.Linear layer, got {type(layer).__name__}; other layers stay whole"
        )
    if kind == "rowwise":
        _check_divides(f"{name}.in_features", layer.in_features, degree, where)
        return
    if layer.out_features % stacked:
        raise UserError(f"{where}: {name}.out_features={layer.out_features} is not a multiple of {stacked} matrices")
    what = f"{name}.out_features" + (f"/{stacked}" if stacked > 1 else "")
    _check_divides(what, layer.out_features // stacked, degree, where)


def _check_divides(what: str, size: int, degree: int, where: str) -> None:
    if size % degree:
        raise UserError(
            f"{where}: {degree} ranks do not divide {what}={size} (config key strategy.strategy.size), and nothing is "
            "padded. Use a number of ranks that divides it, or change the model"
        )


def _check_shared(module: nn.Module, layers: list[str], owner: str) -> None:
    """Refuse a layer whose parameter is registered in another place too: only one of both would be cut."""
    places: dict[Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    for names in places.values():
        cut = next((name for name in names if name.rpartition(".")[0] in layers), None)
        if cut is not None and len(names) > 1:
            other = next(name for name in names if name != cut)
            raise UserError(
                f"{owner}: {cut} is also {other}, and only one of both would be cut. Leave "
                f"{cut.rpartition('.')[0]} out of the plan, or do not share the weight"
            )
