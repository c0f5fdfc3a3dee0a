"""The algorithms of optimizers whose state exists in 32 and in 8 bits: names of their moments and options in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, RMSprop

from stabletrain.runtime.internals.quantized_state import in_4_bits, is_bitsandbytes, is_torchao

Options = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Algorithm:
    """An algorithm.

    Args:
        name: for messages.
        key: name in bitsandbytes.
        moments: bitsandbytes' tensors of a parameter -> names of the moments in each, in the 32-bit state.
        off: options that bitsandbytes' form does not have, and their values when they are off.
    """

    name: str
    key: str
    moments: Mapping[str, tuple[str, ...]]
    off: Options

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the moments in the 32-bit state."""
        return tuple(name for names in self.moments.values() for name in names)


_DECOUPLED: Options = {"weight_decouple": True, "fixed_decay": False}
ADAM = Algorithm(
    "AdamW",
    "adam",
    {"state1": ("exp_avg",), "state2": ("exp_avg_sq",)},
    {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True},
)
ADEMAMIX = Algorithm(
    "AdEMAMix", "ademamix", {"state1": ("exp_avg", "exp_avg_slow"), "state2": ("exp_avg_sq",)}, _DECOUPLED
)
LION = Algorithm("Lion", "lion", {"state1": ("exp_avg",)}, _DECOUPLED)
MOMENTUM = Algorithm(
    "SGD with momentum",
    "momentum",
    {"state1": ("momentum_buffer",)},
    {"nesterov": False, "dampening": 0.0, "maximize": False},
)
RMSPROP = Algorithm(
    "RMSprop", "rmsprop", {"state1": ("square_avg",)}, {"centered": False, "momentum": 0.0, "maximize": False}
)
ALGORITHMS = (ADAM, ADEMAMIX, LION, MOMENTUM, RMSPROP)

_OF_AMSGRAD = "max_exp_avg_sq"
"""A third moment, which the option ``amsgrad`` tells of: it has no 8-bit form that works."""
_OF_DECAY = frozenset({"decoupled_weight_decay", *_DECOUPLED})
"""Options that say how weights decay: without decay they make no difference."""
_OF_TORCH = {Adam: ADAM, AdamW: ADAM, SGD: MOMENTUM, RMSprop: RMSPROP}
_OF_PACKAGE = {("pytorch_optimizer", "Lion"): LION, ("pytorch_optimizer", "AdEMAMix"): ADEMAMIX}


def of_optimizer(optimizer: Any) -> Algorithm | None:
    """The algorithm of an optimizer; None for one whose state does not convert.

    A subclass of a torch optimizer may do anything, so that only torch's own classes count.

    Args:
        optimizer: of any package.
    """
    if is_bitsandbytes(optimizer):
        return next((each for each in ALGORITHMS if each.key == optimizer.optimizer_name), None)
    if is_torchao(optimizer):
        return None if in_4_bits(optimizer) else ADAM
    kind = type(optimizer)
    return _OF_TORCH.get(kind) or _OF_PACKAGE.get((kind.__module__.partition(".")[0], kind.__name__))


def of_32_bits(saved: Mapping[str, Any]) -> Algorithm | None:
    """The algorithm of a saved state with torch's names, also torchao's; None for one that does not convert.

    Args:
        saved: a ``state_dict`` of an optimizer.
    """
    names = moments_of(saved["state"].values()) - {_OF_AMSGRAD}

    def has(group: Options, *options: str) -> bool:
        return all(option in group for option in options)

    def is_of(group: Options) -> Algorithm | None:
        averages = len(group.get("betas", ()))
        if has(group, "betas", "eps", "amsgrad"):
            return ADAM
        if has(group, "momentum", "dampening", "nesterov"):
            return MOMENTUM
        if has(group, "alpha", "centered"):
            return RMSPROP
        if averages == 3 and has(group, "alpha", "eps"):
            return ADEMAMIX
        return LION if averages == 2 and not has(group, "eps") else None

    found = {is_of(group) for group in saved["param_groups"]}
    algorithm = found.pop() if len(found) == 1 else None
    return algorithm if algorithm is not None and names in (set(), set(algorithm.names)) else None


def moments_of(entries: Iterable[Any]) -> set[str]:
    """Names of the tensors in entries of a state, without the count of steps."""
    return {
        name
        for entry in entries
        if isinstance(entry, Mapping)
        for name, value in entry.items()
        if name != "step" and isinstance(value, Tensor)
    }


def of_8_bits(tensors: int, groups: Sequence[Options]) -> Algorithm | None:
    """The algorithm of a state of bitsandbytes, which does not name its own; None for one that does not convert.

    Args:
        tensors: number of tensors per parameter, ``state1`` and ``state2``.
        groups: of parameters, as bitsandbytes has them.
    """
    betas = tuple(groups[0].get("betas", ())) if groups else ()
    if tensors == 2:
        return {2: ADAM, 3: ADEMAMIX}.get(len(betas))
    if len(betas) != 2:
        return None
    if groups[0].get("eps"):
        return RMSPROP if betas[0] else None  # Adagrad has zeros
    return LION if betas[1] else MOMENTUM


def from_8_bits(algorithm: Algorithm, group: Options) -> Options:
    """The options of a group in bitsandbytes' names -> in those of the 32-bit optimizer."""
    options = {key: value for key, value in group.items() if key not in ("alpha", "t_alpha", "t_beta3")}
    options |= algorithm.off
    if algorithm is MOMENTUM:
        options["momentum"] = group["betas"][0]
    elif algorithm is RMSPROP:
        options["alpha"] = group["betas"][0]
    elif algorithm is ADEMAMIX:
        options |= {"alpha": group["alpha"], "t_alpha_beta3": group["t_alpha"]}
    return options


def to_8_bits(algorithm: Algorithm, options: Options) -> Options:
    """The options of a group in the names of the 32-bit optimizer -> in those of bitsandbytes."""
    if algorithm is MOMENTUM:
        return {**options, "betas": (options["momentum"], 0.0)}
    if algorithm is RMSPROP:
        return {**{key: value for key, value in options.items() if key != "alpha"}, "betas": (options["alpha"], 0.0)}
    if algorithm is ADEMAMIX:
        steps = options.get("t_alpha_beta3")
        return {**options, "t_alpha": steps, "t_beta3": steps}
    return options


def missing_option(options: Options, off: Options) -> str | None:
    """The first option that is on in a group although an optimizer does not have it, as text; None: there is none.

    Args:
        options: of a group, in the names of the 32-bit optimizer.
        off: options that the optimizer does not have, with their values when they are off.
    """
    for name, value in off.items():
        if name in options and options[name] != value and not (name in _OF_DECAY and not options.get("weight_decay")):
            return f"{name}={options[name]}"
    return None
