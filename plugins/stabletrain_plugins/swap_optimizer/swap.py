"""Replace the optimizer that a module's ``configure_optimizers`` returns, and keep its groups and schedulers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.optim.build import Arguments, MakeOptimizer
from stabletrain.optim.groups import Decision, decide
from stabletrain.optim.kinds import KINDS
from stabletrain.optim.options import GroupOptions
from stabletrain.optim.table import log_table
from stabletrain.runtime.internals.schedulers import RateChange, mark_step, retarget

_NOT_COPIED = frozenset({"params", "param_names", "lr", "weight_decay"})


def swap(module: nn.Module, output: Any, make: MakeOptimizer, options: GroupOptions, key: str) -> Any:
    """Return what ``configure_optimizers`` returned with another optimizer; its schedulers are moved to that one.

    Each group is divided by what decays. The learning rates of the groups stay; if the new optimizer's arguments have
    an ``lr``, all rates are multiplied by it over the old optimizer's. A ``weight_decay`` among the arguments replaces
    that of groups that decay. Other options that the module has set for single groups are kept if the new optimizer has
    them.

    Args:
        module: the module.
        output: in any of the forms that Lightning accepts.
        make: the new optimizer's class, or a ``functools.partial`` of it with arguments.
        options: of the groups.
        key: config key of the options, for messages.

    Raises:
        UserError: if there is not one optimizer, or something in the module cannot be moved to another one.
    """
    owner = type(module).__name__
    optimizers, schedulers = _parts(output, owner)
    if len(optimizers) != 1:
        raise UserError(
            f"SwapOptimizer: expected one optimizer from configure_optimizers, got {len(optimizers)} from {owner}; "
            "remove SwapOptimizer (config key plugins/optimizer=none)"
        )
    old = optimizers[0]
    if not isinstance(old, Optimizer):
        raise UserError(f"SwapOptimizer: expected an optimizer from {owner}.configure_optimizers, got {old!r:.100}")
    for name, value in vars(module).items():
        if value is old or (isinstance(value, list | tuple) and any(each is old for each in value)):
            raise UserError(
                f"SwapOptimizer: {owner} keeps its optimizer in the attribute {name!r}, which would not be the one "
                "that is trained with; use self.optimizers() there instead"
            )
    split = list(_split(module, old, make, options, key))
    new = _build(old, make, split)
    parts = _match(split, new, make)
    for scheduler in schedulers:
        problem = retarget(scheduler, old, new, [each.parent for each in parts], [each.rates for each in parts])
        if problem is not None:
            raise UserError(
                f"SwapOptimizer: the scheduler {type(scheduler).__name__} of {owner} cannot be moved to "
                f"{type(new).__name__}: {problem}; return another scheduler, or none and use ScheduleLR (config key "
                "schedule)"
            )
    if any("initial_lr" in group for group in old.param_groups):  # there is a scheduler that counts steps
        mark_step(new)
    log_table(module, new, f"in place of {type(old).__name__}")
    return _replaced(output, new)


@dataclass(frozen=True)
class _Child:
    """A part of a group.

    Args:
        parent: index of the group.
        group: the new group.
        names: of its parameters, if the group has names.
        rates: how the group's rates change.
    """

    parent: int
    group: dict[str, Any]
    names: list[str]
    rates: RateChange


def _split(module: nn.Module, old: Optimizer, make: MakeOptimizer, options: GroupOptions, key: str) -> Iterator[_Child]:
    decided = {id(each.tensor.parameter): each for each in decide(module, options, key)}
    arguments = Arguments(make)
    base = _base_rates(old, arguments)
    usual = old.defaults.get("weight_decay") or 0.0
    decaying = [float(group.get("weight_decay") or 0.0) for group in old.param_groups]
    for index, group in enumerate(old.param_groups):
        own = decaying[index]
        exempted = own == 0 and any([usual, *decaying])  # the module has chosen that it does not decay
        given = arguments.value("weight_decay") if arguments.is_given("weight_decay") and not exempted else own
        children: dict[tuple[int, float, float], _Child] = {}
        for position, parameter in enumerate(group["params"]):
            decision = decided.get(id(parameter))
            decay, scale, kind = _of(decision, given)
            place = (KINDS.index(kind), -decay, -scale)
            if place not in children:
                rates = replace(base, scale=scale)
                made = {"params": [], "kind": kind, **_kept(group, old, arguments), **rates.of(group)}
                if arguments.has("weight_decay"):
                    made["weight_decay"] = decay
                children[place] = _Child(index, made, [], rates)
            children[place].group["params"].append(parameter)
            if "param_names" in group:
                children[place].names.append(group["param_names"][position])
        yield from (children[place] for place in sorted(children))


def _of(decision: Decision | None, weight_decay: float) -> tuple[float, float, Any]:
    """Weight decay, scale of the rate, and kind; of a parameter that is not the module's, those of the group."""
    if decision is None:
        return weight_decay, 1.0, "other"
    return decision.decay(weight_decay), decision.lr_scale, decision.tensor.kind


def _kept(group: Mapping[str, Any], old: Optimizer, arguments: Arguments) -> dict[str, Any]:
    """What schedulers and the module have written into a group, and options that differ from the old optimizer's."""
    found = {}
    for name, value in group.items():
        if name in _NOT_COPIED:
            continue
        if name not in old.defaults or (arguments.has(name) and not _same(value, old.defaults[name])):
            found[name] = value
    if "max_momentum" in group and "betas" in found and _same(group["betas"][1:], old.defaults["betas"][1:]):
        # a scheduler that cycles momentum has written the first beta, the others are the new optimizer's
        found["betas"] = (group["betas"][0], *(arguments.value("betas") or group["betas"])[1:])
    return found


def _build(old: Optimizer, make: MakeOptimizer, split: Sequence[_Child]) -> Optimizer:
    arguments = Arguments(make)
    usual: dict[str, Any] = {}
    for name in ("lr", "weight_decay"):
        if arguments.has(name) and not arguments.is_given(name) and old.defaults.get(name) is not None:
            usual[name] = float(old.defaults[name])
    if old.defaults.get("maximize"):
        if not arguments.has("maximize"):
            raise UserError(
                f"SwapOptimizer: the module's {type(old).__name__} maximizes, and {_name(make)} cannot; "
                "return the loss with the other sign"
            )
        usual["maximize"] = True
    try:
        new = make([child.group for child in split], **usual)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        hint = "; stabletrain.MuonAdamW takes all" if _name(make) == "Muon" else ""
        raise UserError(
            f"SwapOptimizer: {_name(make)} cannot be made of the module's parameter groups: {error}{hint}"
        ) from error
    before = [id(each) for group in old.param_groups for each in group["params"]]
    after = [id(each) for group in new.param_groups for each in group["params"]]
    if sorted(before) != sorted(after):
        raise UserError(
            f"SwapOptimizer: {_name(make)} has other parameters than it was given; choose another optimizer"
        )
    return new


def _match(split: Sequence[_Child], new: Optimizer, make: MakeOptimizer) -> list[_Child]:
    """For each group of the new optimizer, which may have divided those that it was given, the part that it is of."""
    owners = {id(p): (child, i) for child in split for i, p in enumerate(child.group["params"])}
    found = []
    for group in new.param_groups:
        children = [owners[id(p)][0] for p in group["params"]]
        if not children or any(each is not children[0] for each in children):
            raise UserError(
                f"SwapOptimizer: {_name(make)} puts parameters of several groups into one, or has one without "
                "parameters; choose another optimizer"
            )
        if children[0].names:
            group["param_names"] = [children[0].names[owners[id(p)][1]] for p in group["params"]]
        found.append(children[0])
    return found


def _base_rates(old: Optimizer, arguments: Arguments) -> RateChange:
    if not arguments.is_given("lr"):
        return RateChange()
    lr, usual = arguments.value("lr"), old.defaults.get("lr")
    if not usual:
        raise UserError(
            f"SwapOptimizer: lr={lr} replaces the rate of the module's {type(old).__name__}, which is {usual}: there "
            "is no ratio; set a rate in configure_optimizers, or remove lr from the new optimizer's arguments"
        )
    return RateChange(before=float(usual), after=float(lr))


def _parts(output: Any, owner: str) -> tuple[list[Any], list[Any]]:
    """The optimizers and schedulers in what ``configure_optimizers`` returned, as Lightning reads it."""
    if output is None:
        raise UserError(f"SwapOptimizer: {owner}.configure_optimizers returned None; return the optimizer to replace")
    if isinstance(output, Mapping):
        return _parts([output], owner)
    if isinstance(output, list | tuple):
        if len(output) == 2 and isinstance(output[0], list):
            found = output[1] if isinstance(output[1], list) else [output[1]]
            return list(output[0]), [_scheduler(each) for each in found]
        if all(isinstance(each, Mapping) for each in output):
            found = [each["lr_scheduler"] for each in output if each.get("lr_scheduler") is not None]
            return [each.get("optimizer") for each in output], [_scheduler(each) for each in found]
        return list(output), []
    return [output], []


def _scheduler(given: Any) -> Any:
    return given.get("scheduler") if isinstance(given, Mapping) else given


def _replaced(output: Any, new: Optimizer) -> Any:
    if isinstance(output, Mapping):
        return {**output, "optimizer": new}
    if isinstance(output, list | tuple):
        if len(output) == 2 and isinstance(output[0], list):
            return [new], output[1]
        if isinstance(output[0], Mapping):
            return [{**output[0], "optimizer": new}]
        return [new]
    return new


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return bool(one == other)


def _name(make: MakeOptimizer) -> str:
    return str(getattr(getattr(make, "func", make), "__name__", make))
