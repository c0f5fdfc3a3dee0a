"""How long a Trainer's run is, in applied optimizer steps, so that lengths of time can be resolved."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer

from stabletrain.core.lengths import RunLength
from stabletrain.runtime.accumulation import AccumulationWindow


def run_length(trainer: Trainer, tokens_per_step: float | None = None) -> RunLength:
    """What is known about the run once its training data is loaded; call it in ``on_train_start`` or later.

    It reads the length of the loader that the fit loop has set up. ``Trainer.estimated_stepping_batches`` would load
    the data if it is not loaded yet, and a stateful loader would then lose the position from the checkpoint.

    Args:
        trainer: in a fit.
        tokens_per_step: tokens in one optimizer step over all ranks, which only the user knows.

    Returns:
        Unknown quantities are None: the total of an endless run, and the steps per epoch of unsized data. Steps that
        will be skipped are included: a run limited by ``max_epochs`` ends that many steps before ``total_steps``.
        Of a module with manual optimization, which steps in a batch as often as it wants, only ``max_steps`` is known;
        its epochs are counted as if every optimizer stepped once for each batch.
    """
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if not trainer.lightning_module.automatic_optimization:
        sized = math.isfinite(batches) and batches > 0
        return RunLength(
            total_steps=trainer.max_steps if trainer.max_steps >= 0 else None,
            steps_per_epoch=batches * len(trainer.optimizers) if sized else None,
            tokens_per_step=tokens_per_step,
        )
    total: int | None = None
    per_epoch: float | None = None
    if math.isfinite(batches) and batches > 0:
        known_epochs = epochs if epochs is not None and epochs > 0 else None
        window = AccumulationWindow(trainer)
        steps = window.steps_in_epochs(known_epochs or 1, batches)
        per_epoch = sum(steps) / len(steps)
        total = sum(steps) if known_epochs else None
    if trainer.max_steps >= 0:
        total = trainer.max_steps if total is None else min(total, trainer.max_steps)
    return RunLength(total_steps=total, steps_per_epoch=per_epoch, tokens_per_step=tokens_per_step)
