"""Load the state of optimizers from a checkpoint, converted between 32 and 8 bits where that is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.optim.conversion import converted
from stabletrain.runtime.internals.loader import override

_CONVERTS = "converts"
"""Marks the method of a strategy that `convert_when_loading` has put there."""
_OF_FOREIGN_STATE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)


def convert_when_loading(trainer: Trainer, once: bool = False) -> Callable[[], None]:
    """Let a trainer load the state of optimizers in 32 bits into 8-bit ones of the same algorithm, and back.

    Args:
        trainer: before it restores a checkpoint.
        once: only the next state that is loaded.

    Returns:
        The function that undoes this.
    """
    load = trainer.strategy.load_optimizer_state_dict
    if hasattr(load, _CONVERTS):  # another plugin's
        return lambda: None

    def load_converted(checkpoint: Mapping[str, Any]) -> None:
        if once:
            undo()
        load(loadable(checkpoint, trainer.strategy.optimizers))

    setattr(load_converted, _CONVERTS, True)
    undo = override(trainer.strategy, "load_optimizer_state_dict", load_converted)
    return undo


def loadable(checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> Mapping[str, Any]:
    """A checkpoint whose optimizer states have the form of these optimizers; the given one is unchanged.

    Args:
        checkpoint: of Lightning.
        optimizers: of the run, in the order of the states.

    Raises:
        UserError: see `converted`.
    """
    states = checkpoint.get("optimizer_states")
    if not isinstance(states, list | tuple):
        return checkpoint
    pairs = zip(optimizers, states, strict=False)
    made = [_converted_or_explained(state, optimizer) if _is_state(state) else state for optimizer, state in pairs]
    return {**checkpoint, "optimizer_states": [*made, *states[len(made) :]]}


def _converted_or_explained(saved: Mapping[str, Any], optimizer: Optimizer) -> Mapping[str, Any]:
    """As `converted`; a state of any content, damaged or of other code, is one message."""
    try:
        return converted(saved, optimizer)
    except UserError:
        raise
    except _OF_FOREIGN_STATE as error:
        raise UserError(
            f"{type(optimizer).__name__}: the optimizer state in the checkpoint cannot be converted "
            f"({type(error).__name__}: {error}): it is damaged, or of other code. Use another checkpoint, or start "
            "from scratch (config key resume)"
        ) from error


def _is_state(state: Any) -> bool:
    """Whether this has the form of an optimizer's state; torch says what is wrong with all else."""
    return (
        isinstance(state, Mapping)
        and isinstance(state.get("state"), Mapping)
        and all(entry is None or isinstance(entry, Mapping) for entry in state["state"].values())
        and isinstance(state.get("param_groups"), list | tuple)
        and all(isinstance(group, Mapping) and "params" in group for group in state["param_groups"])
    )
