"""Load the 32-bit state of another optimizer into one with 8-bit state."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stabletrain.errors import UserError

BLOCK = 256
"""Elements that share a scale in bitsandbytes' state."""
_WRAPPED = "__bnb_optimizer_quant_state__"


def has_own_form(saved: Mapping[str, Any]) -> bool:
    """Whether an optimizer's saved state is that of bitsandbytes, or empty.

    Args:
        saved: a ``state_dict`` of an optimizer.
    """
    states = [each for each in saved["state"].values() if each]
    return not states or all(_WRAPPED in each or "state1" in each for each in states)


@torch.no_grad()
def load_converted(optimizer: Any, saved: Mapping[str, Any], moments: Mapping[str, str]) -> None:
    """Load a state whose moments are tensors in 32 bits, as torch's optimizers save it.

    Args:
        optimizer: of bitsandbytes; tensors that it keeps in 32 bits are copied, the others are quantized.
        saved: a ``state_dict``; its groups must have as many parameters as the optimizer's.
        moments: names of the moments in ``saved`` -> in the optimizer.

    Raises:
        UserError: if it is the state of another algorithm, or of other parameters.
    """
    name, groups = type(optimizer).__name__, saved["param_groups"]
    sizes, theirs = ([len(group["params"]) for group in each] for each in (optimizer.param_groups, groups))
    if sizes != theirs:
        raise UserError(
            f"{name}: the checkpoint's optimizer has parameter groups of {theirs} parameters, this one of {sizes}. Use "
            "the model and the groups of the checkpoint, or start from scratch (config key resume)"
        )
    for group, old in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in old.items() if key in group and key != "params"})
    optimizer.check_overrides()
    quantize = importlib.import_module("bitsandbytes.functional").quantize_blockwise
    for place, (group_index, index, p) in enumerate(_places(optimizer)):
        old = saved["state"].get(place)
        if not old:
            continue
        _check(name, old, moments, p)
        optimizer.state[p] = {}
        optimizer.init_state(optimizer.param_groups[group_index], p, group_index, index)
        state = optimizer.state[p]
        state["step"] = int(old["step"]) if "step" in old else 1
        for theirs_name, own_name in moments.items():
            moment = old[theirs_name].to(p.device)
            if state[own_name].dtype is not torch.uint8:
                state[own_name].copy_(moment)
                continue
            number = own_name.removeprefix("state")
            codes, scales = quantize(moment.float().contiguous(), code=state[f"qmap{number}"], blocksize=BLOCK)
            state[own_name].copy_(codes.view_as(state[own_name]))
            state[f"absmax{number}"].copy_(scales.absmax)


def _places(optimizer: Any) -> Iterator[tuple[int, int, Tensor]]:
    for group_index, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            yield group_index, index, p


def _check(name: str, old: Mapping[str, Any], moments: Mapping[str, str], p: Tensor) -> None:
    missing = [each for each in moments if not isinstance(old.get(each), Tensor)]
    if missing:
        raise UserError(
            f"{name}: expected a checkpoint with the optimizer state {', '.join(moments)}, got "
            f"{', '.join(map(str, old))}. Resume with the optimizer of the checkpoint (config key optimizer), or start "
            "from scratch (config key resume)"
        )
    for each in moments:
        if old[each].shape != p.shape:
            raise UserError(
                f"{name}: {each} in the checkpoint has the shape {tuple(old[each].shape)}, the parameter "
                f"{tuple(p.shape)}: it is the state of another architecture. Use the checkpoint's model, or start from "
                "scratch (config key resume)"
            )
