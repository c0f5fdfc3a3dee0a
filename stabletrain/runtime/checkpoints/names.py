"""The names of parameters in checkpoints, which torch.compile and activation checkpointing do not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """The name of a parameter or buffer without what torch.compile and activation checkpointing add to it.

    >>> plain_name("net._orig_mod.0.weight")
    'net.0.weight'
    """
    for each in _WRAPPERS:
        name = name.replace(each, "")
    return name


def with_own_names(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Weights of a checkpoint under the names that a module has for them, which torch.compile may have changed.

    Args:
        state: a ``state_dict``; a name that the module has stays as it is.
        module: that gets it.

    >>> with_own_names({"weight": 1}, nn.ModuleDict({"_orig_mod": nn.Linear(1, 1, bias=False)}))
    {'_orig_mod.weight': 1}
    """
    own = module.state_dict()
    names = {plain_name(name): name for name in own}
    found: dict[str, Any] = type(state)()  # type: ignore[assignment]
    for key, value in state.items():
        found[key if key in own else names.get(plain_name(key), key)] = value
    if (metadata := getattr(state, "_metadata", None)) is not None:
        found._metadata = metadata  # type: ignore[attr-defined]
    return found


def parameter_names(module: nn.Module) -> dict[Tensor, str]:
    """The plain name of each parameter; of one with several names the first."""
    return {p: plain_name(name) for name, p in module.named_parameters()}
