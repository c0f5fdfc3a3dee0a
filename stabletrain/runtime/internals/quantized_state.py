"""Optimizer state in 8 bits, as bitsandbytes and torchao keep it: recognized, widened and made; each with a test.

bitsandbytes saves, for each parameter, ``state1`` and ``state2``: codes in uint8, with a table of their values
(``qmap``) and the largest absolute value of each block (``absmax``), or plain float32. torchao's state has torch's
names (``exp_avg``) and tensors that wrap codes and scales. bitsandbytes is not needed to read its state.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.runtime.internals.block_codes import decoded, encoded

_WRAPPED = "__bnb_optimizer_quant_state__"
_WRAPS = "_FSDP_WRAPPED_QUANT_STATE_KEY"
"""Attribute of versions that read state that is wrapped in one more dict."""
_KEYS = ("state1", "state2")
_OPTIM = "torchao.optim"
_TORCHAO = ("OptimState8bit", "OptimStateFp8")
"""torchao's classes of state that convert. Its 4-bit state does not: the next update would differ by 38 %."""


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


def is_bitsandbytes(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of bitsandbytes whose state is `_KEYS`, or a subclass of one."""
    return _descends(optimizer, "bitsandbytes.optim", "Optimizer8bit") and hasattr(optimizer, "optimizer_name")


def bitsandbytes_entries(saved: Mapping[str, Any], expected: bool) -> dict[Any, dict[str, Any]] | None:
    """The entries of a saved state, flat, if it is bitsandbytes'; None otherwise, and if there are no entries.

    Args:
        saved: a ``state_dict`` of an optimizer.
        expected: whether the name ``state1`` alone shows it; older versions save tensors in 32 bits without any mark.
    """
    flat = {
        key: {**{name: value for name, value in entry.items() if name != _WRAPPED}, **entry.get(_WRAPPED, {})}
        for key, entry in saved["state"].items()
        if isinstance(entry, Mapping) and entry
    }
    is_own = expected or any(_WRAPPED in entry or "absmax1" in entry for entry in saved["state"].values() if entry)
    return flat if flat and is_own and all("state1" in entry for entry in flat.values()) else None


def widened(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors ``state1`` and ``state2`` of a parameter, in float32.

    Args:
        entry: of `bitsandbytes_entries`.

    Raises:
        ValueError: if its parts do not belong together.
    """
    found = {key: entry[key] for key in _KEYS if isinstance(entry.get(key), Tensor)}
    for key, codes in found.items():
        if codes.dtype is torch.uint8:
            number = key.removeprefix("state")
            found[key] = decoded(codes, entry[f"qmap{number}"], entry[f"absmax{number}"])
        else:
            found[key] = codes.float()
    return found


def narrowed(optimizer: Any, place: tuple[int, int], moments: Mapping[str, Sequence[Tensor]], step: int) -> Any:
    """The entry of a parameter in bitsandbytes' form; in 8 bits where the optimizer keeps its state so.

    Args:
        optimizer: of bitsandbytes.
        place: number of the parameter's group, and its place there.
        moments: by `_KEYS`; two tensors in one are stacked.
        step: how many were made.
    """
    group = optimizer.param_groups[place[0]]
    p, config = group["params"][place[1]], optimizer.get_config(*place, group)
    in_8_bits = config["optim_bits"] == 8 and p.numel() >= config["min_8bit_size"]
    entry: dict[str, Any] = {}
    for key, tensors in moments.items():
        wide = [each.to(p.device, torch.float32).contiguous() for each in tensors]
        if not in_8_bits:
            entry[key] = torch.stack(wide) if len(wide) > 1 else wide[0].clone()
            continue
        number = key.removeprefix("state")
        table = entry[f"qmap{number}"] = _table(optimizer, number, p.device)
        codes, scales = zip(*(encoded(each, table) for each in wide), strict=True)
        entry[key] = torch.stack(codes) if len(wide) > 1 else codes[0]
        entry[f"absmax{number}"] = torch.stack(scales) if len(wide) > 1 else scales[0]
    if config["max_unorm"] > 0.0:
        entry["unorm_vec"] = torch.zeros((1,), device=p.device)
    return {"step": step, _WRAPPED: entry} if hasattr(optimizer, _WRAPS) else {"step": step, **entry}


def _table(optimizer: Any, number: str, device: torch.device) -> Tensor:
    name = "dynamic" if number == "1" else "udynamic"
    if name not in optimizer.name2qmap:
        optimizer.fill_qmap()
    optimizer.name2qmap[name] = optimizer.name2qmap[name].to(device)  # one tensor for all parameters, as in its step
    found: Tensor = optimizer.name2qmap[name]
    return found


# ---- torchao ---------------------------------------------------------------------------------------------------------


def is_torchao(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of torchao's Adam and AdamW."""
    return _descends(optimizer, _OPTIM, "_AdamBase")


def is_decoupled(optimizer: Any) -> bool:
    """Whether the weight decay of a torchao optimizer is decoupled: AdamW."""
    return bool(optimizer.is_adamw)


def in_4_bits(optimizer: Optimizer) -> bool:
    """Whether a torchao optimizer keeps its state in 4 bits."""
    return any(_descends(optimizer, _OPTIM, name) for name in ("Adam4bit", "AdamW4bit"))


def torchao_kinds(saved: Mapping[str, Any]) -> set[str]:
    """Names of torchao's classes of tensors in a saved state."""
    values = [each for entry in saved["state"].values() if isinstance(entry, Mapping) for each in entry.values()]
    return {type(each).__name__ for each in values if type(each).__module__.startswith(_OPTIM)}


def import_known(name: str) -> bool:
    """Import the package of a class that a checkpoint names, if it is one of torchao's state and installed.

    Nothing else is imported for a name in a file.

    Args:
        name: module and name of the class.

    Returns:
        Whether it was imported.
    """
    if not (name.startswith(f"{_OPTIM}.") and name.rpartition(".")[2] in _TORCHAO):
        return False
    if _OPTIM in sys.modules or importlib.util.find_spec("torchao") is None:
        return False
    importlib.import_module(_OPTIM)
    return True


def torchao_widens(kinds: set[str]) -> bool:
    """Whether all of these classes convert.

    Args:
        kinds: from `torchao_kinds`.
    """
    return kinds <= set(_TORCHAO)


def torchao_buffer(optimizer: Any, p: Tensor, signed: bool) -> Tensor:
    """A moment of zeros, of the class that a torchao optimizer keeps for a parameter.

    Args:
        optimizer: of torchao.
        p: the parameter.
        signed: whether it has negative values.
    """
    buffer: Tensor = optimizer._new_buffer(p, signed)
    return buffer


def plain(moment: Any) -> Tensor:
    """A moment as a plain tensor; torchao's are decoded."""
    wide: Tensor = moment.dequantize() if type(moment).__name__ in _TORCHAO else moment
    return wide


# ---- optimizers that hold others -------------------------------------------------------------------------------------


def holds_quantized(optimizer: Optimizer) -> bool:
    """Whether an optimizer holds one of bitsandbytes or torchao, as ZeroRedundancyOptimizer and Lookahead may."""
    return any(is_bitsandbytes(each) or is_torchao(each) for each in _inner(list(vars(optimizer).values())))


def _inner(values: Sequence[Any]) -> Iterator[Optimizer]:
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif isinstance(value, list | tuple):
            yield from _inner(value)


def _descends(optimizer: Optimizer, package: str, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith(package) for kind in type(optimizer).__mro__)
