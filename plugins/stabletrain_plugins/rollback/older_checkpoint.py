"""Restores a checkpoint from disk within a running fit, for when no snapshot in memory is old enough.

Parameters, optimizer, schedulers, loss scaler, averaged weights and the plugins' histories become those of the
checkpoint. The data position and the random number generators stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging

from stabletrain.optim.loading import loadable
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.loading import is_ours, read, store_of
from stabletrain.runtime.checkpoints.newest_file import newest_files
from stabletrain.runtime.checkpoints.single_file import load_file
from stabletrain.runtime.checkpoints.store import Store
from stabletrain.runtime.guard.callbacks import RuleCallback
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals import state as state_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.records.event_log import logger


class FoundCheckpoint(NamedTuple):
    """A checkpoint that can be restored.

    Args:
        path: of the checkpoint.
        applied: applied steps in it.
    """

    path: str
    applied: int


def find(trainer: Trainer, before: int) -> FoundCheckpoint | None:
    """The newest good checkpoint of this run from before a step; the same on all ranks. A collective.

    Searches the folders of the run's checkpoint callbacks, then the checkpoint that the run was resumed from.

    Args:
        trainer: in a fit.
        before: the checkpoint must have fewer applied steps than this.

    Returns:
        The checkpoint; None if there is none, or if the strategy has a checkpoint format of its own.
    """
    found: FoundCheckpoint | None = None
    if trainer.is_global_zero and not trainer_internals.reads_own_checkpoints(trainer):
        for path in _candidates(trainer):
            try:
                step = load(path).get("global_step")
                if type(step) is not int:
                    raise CheckpointError("it has no global_step")
            except (CheckpointError, OSError) as error:
                logger.warning("rollback: %s cannot be used: %s", path, error)
                continue
            if step < before:
                found = FoundCheckpoint(str(path), step)
                break
    result: FoundCheckpoint | None = trainer.strategy.broadcast(found)
    return result


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, ours or Lightning's, onto the CPU, with ``weights_only=True``.

    Raises:
        CheckpointError: if it is missing or damaged, or holds more than data.
    """
    return read(Path(path).resolve()).checkpoint if is_ours(path) else load_file(path)


def _candidates(trainer: Trainer) -> Iterator[Path]:
    """Checkpoints of this run, newest first."""
    seen: set[Path] = set()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, both(Checkpoint)):
            continue
        if callable(wait := getattr(callback, "wait", None)):
            wait()  # when a write in progress ends, an older checkpoint is deleted: it could be the one chosen here
        last = getattr(callback, "last", None)
        folder = getattr(callback, "dirpath", None) or (Path(last).parent if last else None)
        if folder is None:
            continue
        ours = store_of(Path(folder))
        if ours is not None:
            entries = Store(ours).entries()
            run = entries[-1].manifest.info.run if entries else None
            paths = [entry.path for entry in reversed(entries) if entry.manifest.info.run == run]
        else:
            paths = newest_files(Path(folder))
        for path in paths:
            if path not in seen:
                seen.add(path)
                yield path
    if trainer.ckpt_path and Path(trainer.ckpt_path) not in seen and Path(trainer.ckpt_path).exists():
        resumed = Path(trainer.ckpt_path)
        folder = None if resumed.is_file() else store_of(resumed)
        yield from [resumed] if folder is None else (entry.path for entry in reversed(Store(folder).entries()))


def restore(guard: StepGuard, path: str, cause: str) -> None:
    """Restore a checkpoint into the running fit; call it on all ranks, in ``on_train_batch_end``.

    Args:
        guard: of the run.
        path: found by `find`.
        cause: passed to the rules (`Rule.rebase`).

    Raises:
        Exception: one of several kinds, if the checkpoint is damaged or belongs to another model.
    """
    guard.settle()
    trainer, module = guard.trainer, guard.module
    checkpoint = load(path)
    module.on_load_checkpoint(checkpoint)
    averaging = [each for each in trainer.callbacks if isinstance(each, both(WeightAveraging))]  # type: ignore[attr-defined]
    trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    for callback in averaging:
        callback.on_load_checkpoint(trainer, module, checkpoint)
        callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    trainer.strategy.load_optimizer_state_dict(loadable(checkpoint, trainer.optimizers))
    for config, state in zip(trainer.lr_scheduler_configs, checkpoint.get("lr_schedulers", []), strict=False):
        config.scheduler.load_state_dict(state)
    precision = trainer.precision_plugin
    if state := checkpoint.get(type(precision).__qualname__):
        precision.load_state_dict(state)
    state_internals.set_global_step(trainer, checkpoint["global_step"])
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
    saved = checkpoint.get("callbacks", {})
    guard.after_restore(next((saved[m.state_key] for m in guard.members if saved.get(m.state_key)), {}))
    own = guard.state_dict()
    for member in guard.members:
        state = saved.get(member.state_key)
        if state:
            member.load_state_dict({**state, **own})
        if isinstance(member, RuleCallback):
            member.change_states(functools.partial(member.rule.rebase, cause=cause))
