"""Faults that `stabletrain.chaos` does not have: set values, faults of chosen steps, and a bad part of the data."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Collection
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from stabletrain import chaos

Chosen = Callable[[int, int], bool]
"""Whether a fault acts: of the attempted step, counted from the fault's first, and the micro-batch in its window."""


class SetWeight(chaos.Fault):
    """Sets one weight to another value before a step; it is not restored."""

    def __init__(self, at_step: int, parameter: str, value: float) -> None:
        super().__init__(at_step)
        self.parameter, self.value = parameter, value

    def apply(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        with torch.no_grad():
            module.get_parameter(self.parameter).view(-1)[0] = self.value


class SetAttribute(chaos.Fault):
    """Sets an attribute of the module from a step on, so that it uses more or less of a batch: a legitimate change."""

    def __init__(self, at_step: int, name: str, value: Any) -> None:
        super().__init__(at_step)
        self.name, self.value = name, value

    def apply(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        setattr(module, self.name, self.value)


def only(fault: chaos.Fault, chosen: Chosen) -> chaos.Fault:
    """Let a fault act in chosen steps and micro-batches only, out of those in which it would act.

    Args:
        fault: is changed, and returned.
        chosen: called once for each micro-batch in which the fault would act.
    """
    is_due = fault.is_due

    def is_chosen(trainer: L.Trainer, step: int) -> bool:
        micro = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches
        return is_due(trainer, step) and chosen(step - fault.at_step, micro)

    fault.is_due = is_chosen  # type: ignore[method-assign]
    return fault


def every(period: int) -> Chosen:
    """Choose every ``period``-th step, from the first on."""
    return lambda step, micro: step % period == 0


def share(probability: float, seed: int) -> Chosen:
    """Choose each step with a probability, all its micro-batches alike."""
    return lambda step, micro: random.Random(f"{seed} {step}").random() < probability


class BadShard(chaos.BadBatch):
    """A number of consecutive batches of the data have bad content, whenever they come.

    A batch is recognised by its content. So a batch that is repeated after a rollback is bad again, one that was left
    out does not come again, and batches from before the shard that are repeated are not bad.

    Args:
        at_step: as of `BadBatch`; the shard begins with the first batch at or after it.
        kind: as of `BadBatch`.
        batches: number of different batches, >= 1.
        more: arguments of `BadBatch`.
    """

    def __init__(self, at_step: int, kind: Literal["random", "shuffled_labels"], batches: int, **more: Any) -> None:
        super().__init__(at_step, kind, steps=10**9, once=False, **more)
        self.batches = batches
        self.healthy: Collection[int] = ()
        """Digests of the batches before the shard."""
        self._bad: set[int] = set()
        self._is_bad = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        name = digest(batch)
        if name not in self.healthy and len(self._bad) < self.batches:
            self._bad.add(name)
        self._is_bad = name in self._bad
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def is_due(self, trainer: L.Trainer, step: int) -> bool:
        return self._is_bad


def digest(batch: Tensor) -> int:
    """Return a number that stands for the content of a batch on the CPU."""
    return zlib.crc32(batch.numpy().tobytes())
