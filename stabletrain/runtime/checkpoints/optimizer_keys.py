"""States of optimizers by parameter name, as several processes save them, and by number, as torch loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stabletrain.runtime.checkpoints.errors import CheckpointError


def is_by_name(state: Any) -> bool:
    """Whether the state of an optimizer has names of parameters in place of numbers."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(each, Mapping) for each in [*groups, state.get("state")]):
        return False
    return any(isinstance(each, str) for group in groups for each in _params(group))


def by_number(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state by name as the same one by number: that of the parameter's position in the groups.

    >>> state = {"state": {"b": {"step": 1}}, "param_groups": [{"lr": 0.1, "params": ["a", "b"]}]}
    >>> by_number(state)
    {'state': {1: {'step': 1}}, 'param_groups': [{'lr': 0.1, 'params': [0, 1]}]}
    """
    return for_parameters(state, [_params(group) for group in state["param_groups"]])


def for_parameters(state: Mapping[str, Any], groups: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A state by name or by number as one that ``load_state_dict`` of an optimizer takes.

    Args:
        state: of a ``state_dict``.
        groups: for each parameter group of the optimizer, the names of its parameters in order.

    Raises:
        CheckpointError: if the saved groups hold other parameters.
    """
    saved = state["param_groups"]
    if len(saved) != len(groups):
        raise CheckpointError(
            f"resume: the optimizer has {len(groups)} parameter groups, and the checkpoint's had {len(saved)}"
        )
    named = is_by_name(state)
    numbers: dict[Any, int] = {}
    renamed = []
    for i, (group, names) in enumerate(zip(saved, groups, strict=True)):
        keys = _params(group)
        differs = set(keys) ^ set(names) if named else len(keys) != len(names)
        if differs:
            which = f" ({min(map(str, set(keys) ^ set(names)))} is in one of them)" if named else ""
            raise CheckpointError(
                f"resume: group {i} of the optimizer has {len(names)} parameters, and that of the checkpoint "
                f"{len(keys)}{which}: expected the same model and the same groups"
            )
        order = names if named else keys
        first = len(numbers)
        numbers.update({key: first + k for k, key in enumerate(order)})
        renamed.append({**group, "params": list(range(first, first + len(order)))})
    states = {numbers.get(key, key): each for key, each in state["state"].items()}
    return {**state, "state": states, "param_groups": renamed}


def _params(group: Any) -> list[Any]:
    found = group.get("params") if isinstance(group, Mapping) else None
    return list(found) if isinstance(found, list | tuple) else []
