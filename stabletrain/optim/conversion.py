"""A checkpoint of a 32-bit optimizer continues with 8-bit state, and back: `converted`, called when it is loaded.

Files keep the form in which an optimizer writes its state, so that state that is loaded into the same optimizer is the
same, bit for bit. Reasons, and the pairs that convert: docs/decisions/0027.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from stabletrain.errors import UserError
from stabletrain.optim import algorithms
from stabletrain.optim.algorithms import Algorithm, Options
from stabletrain.runtime.internals import quantized_state as quantized

_ADVICE = (
    "Resume with the optimizer of the checkpoint (config key optimizer), or start from scratch (config key resume)"
)


class _Found(NamedTuple):
    """What a checkpoint holds.

    Args:
        algorithm: of the state; None: one that does not convert.
        words: its form, for messages.
        entries: of bitsandbytes' state, flat; None: torch's names.
        kinds: torchao's classes of tensors.
    """

    algorithm: Algorithm | None
    words: str
    entries: dict[Any, dict[str, Any]] | None
    kinds: set[str]


class _Slot(NamedTuple):
    """A parameter, where it is, and its key in the saved state."""

    key: Any
    group: int
    place: int
    p: Tensor


@torch.no_grad()
def converted(saved: Mapping[str, Any], optimizer: Optimizer) -> Mapping[str, Any]:
    """The saved state of an optimizer in the form of another one of the same algorithm.

    Moments are quantized, or widened to float32; counts of steps, learning rates and all options of the groups are
    those of the checkpoint, as when torch loads a state. Only state in 8 bits, or for an optimizer with such state, is
    touched; what has the optimizer's own form is returned as it is.

    Args:
        saved: a ``state_dict``; its parameters may be numbers or names. They belong to the optimizer's in their order.
        optimizer: that shall load it; nothing of it is changed.

    Raises:
        UserError: if it is the state of another algorithm, of other parameters, or an option of it would be lost.
    """
    to_bitsandbytes, to_torchao = quantized.is_bitsandbytes(optimizer), quantized.is_torchao(optimizer)
    found = _find(saved, to_bitsandbytes)
    is_quantized = found.entries is not None or bool(found.kinds)
    if not (is_quantized or to_bitsandbytes or to_torchao) or quantized.holds_quantized(optimizer):
        return saved
    if not any(saved["state"].values()) and found.algorithm is None:
        return saved
    mine = algorithms.of_optimizer(optimizer)
    if to_bitsandbytes and found.entries is not None:
        # its state does not say whose it is: what looks as this optimizer's own groups do is its own
        if mine is None or mine is found.algorithm:
            return saved
        if found.algorithm is algorithms.of_8_bits(len(mine.moments), optimizer.param_groups):
            return saved
        _refuse(optimizer, mine, found)
    if to_torchao and found.entries is None and _is_own_torchao(optimizer, saved):
        return saved
    if mine is None or mine is not found.algorithm or not quantized.torchao_widens(found.kinds):
        _refuse(optimizer, mine, found)
    slots = list(_slots(optimizer, saved))
    groups = [
        _group(optimizer, mine, found, own, old)
        for own, old in zip(optimizer.param_groups, saved["param_groups"], strict=True)
    ]
    if to_bitsandbytes:
        optimizer.check_overrides()  # type: ignore[attr-defined]  # before the bits of a parameter are asked for
    state = {}
    for slot in slots:
        old = (saved["state"] if found.entries is None else found.entries).get(slot.key) or {}
        moments = _moments(optimizer, mine, found, old, slot.p)
        if not moments:
            continue
        step = int(old.get("step", saved["param_groups"][slot.group].get("step", 1)))
        state[slot.key] = _entry(optimizer, mine, slot, moments, step)
        if type(optimizer).__module__.startswith("pytorch_optimizer"):
            groups[slot.group]["step"] = step  # its groups count
    return {**saved, "state": state, "param_groups": groups}


def _find(saved: Mapping[str, Any], expected: bool) -> _Found:
    entries, kinds = quantized.bitsandbytes_entries(saved, expected), quantized.torchao_kinds(saved)
    if entries is not None:
        tensors = 2 if any("state2" in entry for entry in entries.values()) else 1
        one = algorithms.of_8_bits(tensors, saved["param_groups"])
        words = "bitsandbytes' state"
    else:
        one = algorithms.of_32_bits(saved)
        words = ", ".join(sorted(algorithms.moments_of(saved["state"].values()))) or "none"
    if one is not None:
        words += f" of {one.name}"
    if kinds:
        words += f" as torchao's {' and '.join(sorted(kinds))}"
    return _Found(one, words, entries, kinds)


def _refuse(optimizer: Optimizer, mine: Algorithm | None, found: _Found) -> NoReturn:
    name = type(optimizer).__name__
    if mine is None:
        raise UserError(
            f"{name}: expected a checkpoint of {name}, got {found.words}, which cannot be converted to its state. "
            + _ADVICE
        )
    raise UserError(
        f"{name}: expected a checkpoint of {mine.name}, in 32 or 8 bits (optimizer state {', '.join(mine.names)}), got "
        f"{found.words}. {_ADVICE}"
    )


def _is_own_torchao(optimizer: Any, saved: Mapping[str, Any]) -> bool:
    """Whether a state has the classes that a torchao optimizer would make, and tensors as learning rates."""
    if not all(isinstance(group.get("lr"), Tensor) for group in saved["param_groups"]):
        return False
    for slot in _slots(optimizer, saved):
        moment = (saved["state"].get(slot.key) or {}).get("exp_avg")
        if moment is not None and type(moment) is not type(quantized.torchao_buffer(optimizer, slot.p, True)):
            return False
    return True


def _slots(optimizer: Optimizer, saved: Mapping[str, Any]) -> Iterator[_Slot]:
    """The optimizer's parameters and their keys in a saved state.

    Raises:
        UserError: if the groups have other sizes.
    """
    sizes, theirs = (
        [len(group["params"]) for group in each] for each in (optimizer.param_groups, saved["param_groups"])
    )
    if sizes != theirs:
        raise UserError(
            f"{type(optimizer).__name__}: the checkpoint's optimizer has parameter groups of {theirs} parameters, this "
            f"one of {sizes}. Use the model and the groups of the checkpoint, or start from scratch (config key resume)"
        )
    for number, (own, old) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=True)):
        for index, (p, key) in enumerate(zip(own["params"], old["params"], strict=True)):
            yield _Slot(key, number, index, p)


def _group(optimizer: Optimizer, mine: Algorithm, found: _Found, own: Options, old: Options) -> Options:
    """A group of the optimizer with the options of the checkpoint, of those that it has."""
    options = dict(old) if found.entries is None else algorithms.from_8_bits(mine, old)
    if quantized.is_bitsandbytes(optimizer):
        _check_options(optimizer, options, mine.off)
        options = algorithms.to_8_bits(mine, options)
    elif quantized.is_torchao(optimizer):
        # a checkpoint of torchao does not say whether its decay is decoupled
        decoupled = quantized.is_decoupled(optimizer)
        _check_options(optimizer, options, {**mine.off, "decoupled_weight_decay": decoupled})
    kept = {key: _like(value, own[key]) for key, value in options.items() if key in own}
    return {**own, **kept, "params": old["params"]}


def _check_options(optimizer: Optimizer, options: Options, off: Options) -> None:
    lost = algorithms.missing_option(options, off)
    if lost is not None:
        name = type(optimizer).__name__
        raise UserError(f"{name}: the checkpoint's optimizer has {lost}, which {name} cannot continue. {_ADVICE}")


def _like(value: Any, own: Any) -> Any:
    """A number as the optimizer keeps it: torchao's learning rate is a tensor."""
    if isinstance(own, Tensor):
        return torch.full_like(own, float(value))
    return value.item() if isinstance(value, Tensor) and isinstance(own, float) else value


def _moments(
    optimizer: Optimizer, mine: Algorithm, found: _Found, old: Mapping[str, Any], p: Tensor
) -> dict[str, Tensor]:
    """The moments of a parameter in 32 bits, by torch's names; none if it has none yet."""
    if found.entries is None:
        moments = {each: quantized.plain(old[each]) for each in mine.names if isinstance(old.get(each), Tensor)}
    else:
        moments = {}
        for key, tensor in quantized.widened(old).items():
            names = mine.moments[key]
            moments |= zip(names, [tensor] if len(names) == 1 else tensor, strict=True)
    if moments and not moments.keys() >= set(mine.names):
        _refuse(optimizer, mine, found._replace(words=", ".join(moments)))
    for name, moment in moments.items():
        if moment.shape != p.shape:
            raise UserError(
                f"{type(optimizer).__name__}: {name} in the checkpoint has the shape {tuple(moment.shape)}, the "
                f"parameter {tuple(p.shape)}: it is the state of another architecture. Use the checkpoint's model, or "
                "start from scratch (config key resume)"
            )
    return moments


def _entry(optimizer: Any, mine: Algorithm, slot: _Slot, moments: Mapping[str, Tensor], step: int) -> dict[str, Any]:
    """The state of a parameter in the optimizer's form."""
    if quantized.is_bitsandbytes(optimizer):
        tensors = {key: [moments[name] for name in names] for key, names in mine.moments.items()}
        entry: dict[str, Any] = quantized.narrowed(optimizer, (slot.group, slot.place), tensors, step)
        return entry
    if quantized.is_torchao(optimizer):
        made = {name: quantized.torchao_buffer(optimizer, slot.p, name == "exp_avg") for name in moments}
        for name, buffer in made.items():
            buffer.copy_(moments[name].to(slot.p.device, torch.float32))
        return {"step": torch.tensor(float(step)), **made}
    if type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, SGD):
        return {"step": torch.tensor(float(step)), **moments}
    return dict(moments)
