"""How Lightning's ranks tell each other of a SIGTERM, and how often ours do; each function with a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from stabletrain.runtime.internals.loader import override
from stabletrain.runtime.internals.trainer import batches_seen, may_be_last_batch

_EVERY = "stabletrain_sigterm_every"
"""Attribute of a Trainer, which goes with it to processes that are started by spawn."""


def set_every(trainer: Trainer, batches: int) -> None:
    """Note after how many batches the ranks ask each other whether one of them was told to stop."""
    vars(trainer)[_EVERY] = batches


def every(trainer: Trainer) -> int:
    """The number of `set_every`; 1 without it."""
    return int(vars(trainer).get(_EVERY, 1))


def is_asked_after_batch(trainer: Trainer, asked_at: int) -> bool:
    """Whether the ranks ask each other after this training batch; the same on all ranks.

    Args:
        trainer: in ``on_train_batch_end``.
        asked_at: `batches_seen` when they last did.
    """
    n = every(trainer)
    return n == 1 or batches_seen(trainer) // n > asked_at // n or may_be_last_batch(trainer)


def is_asked_in_validation(trainer: Trainer, batch_idx: int, dataloader_idx: int) -> bool:
    """Whether the ranks ask each other after this batch of a validation.

    Args:
        trainer: in ``on_validation_batch_end``.
        batch_idx: of the batch, from 0.
        dataloader_idx: of its loader.
    """
    n = every(trainer)
    return n == 1 or (batch_idx + 1) % n == 0 or batch_idx + 1 == trainer.num_val_batches[dataloader_idx]


def leave_sigterm_to_us(trainer: Trainer) -> Callable[[], None]:
    """Let Lightning not broadcast in each batch whether its own handler has received SIGTERM; ours is installed.

    Args:
        trainer: in ``on_train_start``, on all ranks; nothing changes if the ranks ask each other after each batch.

    Returns:
        The function that undoes this.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if every(trainer) == 1:
        return lambda: None
    return override(loop, "_broadcast_sigterm_tensor", lambda: None)
