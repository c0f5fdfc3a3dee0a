"""What a ring of snapshots costs in memory: said before it is taken, and refused if it is too much."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stabletrain.core.bytes import parse, shown
from stabletrain.errors import UserError
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals.free_memory import device_memory, host_memory
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.snapshots.buffers import bytes_of
from stabletrain_plugins.rollback.rollback_rule import RollbackRule
from stabletrain_plugins.rollback.snapshot_ring import SnapshotRing


class MemoryPlan(NamedTuple):
    """What will be taken on a rank.

    Args:
        copies: bytes of all snapshots together.
        keep: how many they are.
        remembered: bytes of all batches that the tape remembers.
        batches: how many they are.
        spill: a folder: the snapshots take no memory.
    """

    copies: int
    keep: int
    remembered: int
    batches: int
    spill: str | None

    @classmethod
    def of(cls, copies: int, keep: int, batch: Any, batches: int, spill: str | None) -> MemoryPlan:
        """From one of the batches."""
        size = bytes_of([leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)])
        return cls(copies, keep, size * batches, batches, spill)

    def __str__(self) -> str:
        snapshots = f"{self.keep} snapshots of {shown(self.copies / self.keep)}"
        return f"{snapshots} and {self.batches} batches of {shown(self.remembered / self.batches)}"

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return self.remembered + (0 if self.spill else self.copies)

    def problem(self, max_memory: str | None, free: float) -> str | None:
        """Why it is too much; None if it is not.

        Args:
            max_memory: the limit; None: what is free.
            free: bytes that this rank may take.
        """
        limit = free if max_memory is None else parse(max_memory)
        if limit is None or self.memory <= limit:
            return None
        than = f"than the {shown(free)} that are free" if max_memory is None else f"than max_memory={max_memory}"
        raising = "" if max_memory is None else ", raise plugins.spike.max_memory"
        return (
            f"rollback: {self} take {shown(self.memory)} of memory on each rank, more {than}. Keep fewer "
            "(plugins.spike.keep), take them more often, so that fewer batches are remembered (plugins.spike.every), "
            f"put them on disk (plugins.spike.spill=<folder>){raising}, or go without (plugins/spike=detect, or "
            'default_callbacks(spike="detect"))'
        )


def take(rule: RollbackRule, ring: SnapshotRing, guard: StepGuard, batch: Any) -> None:
    """All of it now: later, a snapshot costs its copy alone. A collective.

    Args:
        rule: the arguments.
        ring: not prepared yet.
        guard: of the run.
        batch: one of those that the tape remembers.

    Raises:
        UserError: on all ranks, if one has too little.
    """
    trainer, batches = guard.trainer, rule.keep * rule.every * guard.trainer.accumulate_grad_batches
    needs = MemoryPlan.of(ring.bytes_needed(guard), rule.keep, batch, batches, rule.spill)
    device = next(guard.module.parameters()).device
    problem = needs.problem(rule.max_memory, free_for_a_rank(trainer, rule.where, device))
    if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(problem is not None, all=False):
        problem = problem or "rollback: another rank has too little memory for its snapshots, and says how much"
    if problem is not None:
        raise UserError(problem)
    if trainer.is_global_zero:
        on_disk = f", the snapshots in {rule.spill}" if rule.spill else ""
        logger.info("rollback keeps up to %s: %s of memory%s on each rank", needs, shown(needs.memory), on_disk)
    ring.prepare(guard)


def free_for_a_rank(trainer: Trainer, where: str, device: torch.device) -> float:
    """Bytes that one of this machine's ranks may take for snapshots."""
    if where == "device" and device.type == "cuda":
        return device_memory(device)
    return host_memory() / trainer.num_devices
