"""How Lightning collects and restores the state of strategies that divide it among processes; each with a test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer

from stabletrain.runtime.internals.loader import override


@contextlib.contextmanager
def collecting_states(
    trainer: Trainer, model: Callable[[], Mapping[str, Any]], optimizer: Callable[[Any], dict[str, Any]]
) -> Iterator[None]:
    """Let the trainer take these states into checkpoints, in place of those that its strategy gathers.

    Args:
        trainer: in a fit.
        model: returns the state of the module.
        optimizer: returns the state of an optimizer.
    """
    undos = [
        override(trainer.strategy, "lightning_module_state_dict", model),
        override(trainer.strategy, "optimizer_state", optimizer),
    ]
    try:
        yield
    finally:
        for undo in undos:
            undo()


def around_reading(
    trainer: Trainer, read: Callable[[Callable[[], dict[str, Any]], Any], dict[str, Any]]
) -> Callable[[], None]:
    """Call ``read(load, path)`` when a strategy that reads checkpoints itself is to read one.

    Args:
        trainer: before it restores a checkpoint.
        read: gets the function that reads as before, and the path.

    Returns:
        The function that undoes this.
    """
    load = trainer.strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read(lambda: load(checkpoint_path, *args, **kwargs), checkpoint_path)

    return override(trainer.strategy, "load_checkpoint", load_checkpoint)


def around_weights(
    trainer: Trainer, restore: Callable[[Callable[[], None], Mapping[str, Any]], None]
) -> Callable[[], None]:
    """Call ``restore(load, checkpoint)`` in place of each ``load`` of the weights of a checkpoint.

    Args:
        trainer: before it restores a checkpoint.
        restore: gets the function that loads them as before, and the checkpoint.

    Returns:
        The function that undoes this.
    """
    load = trainer.strategy.load_model_state_dict

    def load_model_state_dict(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        restore(lambda: load(checkpoint, strict), checkpoint)

    return override(trainer.strategy, "load_model_state_dict", load_model_state_dict)


def before_optimizers(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Call ``call`` before the trainer restores optimizers and schedulers of a checkpoint.

    Args:
        trainer: before it restores a checkpoint.
        call: loads the states of optimizers that Lightning leaves to the strategy.

    Returns:
        The function that undoes this.
    """
    connector = trainer._checkpoint_connector
    restore = connector.restore_optimizers_and_schedulers

    def wrapped() -> None:
        call()
        restore()

    return override(connector, "restore_optimizers_and_schedulers", wrapped)
