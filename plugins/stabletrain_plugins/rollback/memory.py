"""Where snapshots are stored, and the check and allocation of their memory before the first one is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from stabletrain.core.bytes import parse, shown
from stabletrain.core.planned import Planned, Sizes, total
from stabletrain.errors import UserError
from stabletrain.runtime.data.batch_size import batch_bytes
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals.free_memory import device_memory, host_memory
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers
from stabletrain.runtime.snapshots.disk_buffers import DiskBuffers
from stabletrain.runtime.snapshots.overlap import Overlap
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain_plugins.rollback.rollback_rule import RollbackRule
from stabletrain_plugins.rollback.snapshot_ring import SnapshotRing

_TAPE_IS_FULL = (
    "rollback: %d batches take more than %s, which is left of plugins.spike.max_memory (default: the free memory) "
    "besides the snapshots: batches have become larger than the first one. Fewer are stored: a rollback to an older "
    "snapshot then does not restore the data position. Raise plugins.spike.max_memory, or take snapshots more often "
    "(plugins.spike.every)"
)

_OTHER_CONTENT = (
    "rollback: a batch that was fetched again has other content than before, although its samples are the same: the "
    "dataset draws random numbers of its own, or its data have changed. The steps since the restored snapshot are not "
    "made again as they were. Keep the batches themselves (plugins.spike.tape=batches)"
)


class MemoryPlan(NamedTuple):
    """The memory that one rank needs.

    Args:
        copies: all snapshots together, bytes.
        keep: number of snapshots.
        taped: all batches on the data tape together, bytes.
        batches: number of these batches.
        spill: folder of the snapshots; None: they are in memory.
        fetched_again: only the sample indices of batches are stored.
    """

    copies: int
    keep: int
    taped: int
    batches: int
    spill: str | None
    fetched_again: bool = False

    @classmethod
    def of(
        cls, copies: int, keep: int, batch: Any, batches: int, spill: str | None, fetched_again: bool = False
    ) -> MemoryPlan:
        """The plan for batches of the size of ``batch``."""
        taped = 0 if fetched_again else batch_bytes(batch) * batches
        return cls(copies, keep, taped, batches, spill, fetched_again)

    def __str__(self) -> str:
        snapshots = f"{self.keep} snapshots of {shown(self.copies / self.keep)}"
        if self.fetched_again:
            return f"{snapshots} and the sample indices of {self.batches} batches"
        return f"{snapshots} and {self.batches} batches of {shown(self.taped / self.batches)}"

    @property
    def memory(self) -> int:
        """Bytes of memory; snapshots on disk do not count."""
        return self.taped + (0 if self.spill else self.copies)

    def left_for_tape(self, max_memory: str | None, free: float, on_device: bool) -> float:
        """The memory that is left for the tape besides the snapshots, bytes.

        Args:
            max_memory: the limit; None: ``free``.
            free: main memory that this rank may use, bytes.
            on_device: whether the snapshots are not in main memory.
        """
        limit = free if max_memory is None else parse(max_memory)
        elsewhere = self.spill or (on_device and max_memory is None)
        return limit - (0 if elsewhere else self.copies)

    def device_problem(self, device: torch.device, free: float) -> str | None:
        """The error message if the snapshots do not fit beside the training on its device; None if they do.

        Args:
            device: where the snapshots are.
            free: memory that is free there at the peak of a step, bytes.
        """
        if self.copies <= free:
            return None
        return (
            f"rollback: {self.keep} snapshots of {shown(self.copies / self.keep)} take {shown(self.copies)} of the "
            f"memory of {device}, more than the {shown(free)} that are free at the peak of a step. Keep them in main "
            "memory (plugins.spike.where=host), where copying them hardly delays the training, or use fewer "
            "(plugins.spike.keep)"
        )

    def problem(self, max_memory: str | None, free: float, on_device: bool = False) -> str | None:
        """The error message if the plan needs too much memory; None if it does not.

        Args:
            max_memory: the limit; None: ``free``.
            free: main memory that this rank may use, bytes.
            on_device: whether the snapshots are not in main memory.
        """
        limit = free if max_memory is None else parse(max_memory)
        needed = self.taped if on_device and max_memory is None else self.memory
        if limit is None or needed <= limit:
            return None
        than = f"than the {shown(free)} that are free" if max_memory is None else f"than max_memory={max_memory}"
        again = "" if self.fetched_again else ", keep sample indices in place of batches (plugins.spike.tape=indices)"
        raising = "" if max_memory is None else ", raise plugins.spike.max_memory"
        return (
            f"rollback: {self} take {shown(needed)} of memory on each rank, more {than}. Use fewer snapshots "
            "(plugins.spike.keep), take them more often, so that fewer batches are kept in memory "
            f"(plugins.spike.every), put them on disk (plugins.spike.spill=<folder>){raising}{again}, or train "
            "without rollback (plugins/spike=detect)"
        )


def new_snapshot(rule: RollbackRule, overlap: Overlap | None = None) -> Snapshot:
    """An empty snapshot in host memory, on the device, or in the folder ``spill``.

    Args:
        rule: the plugin's arguments.
        overlap: of all snapshots of the run whose tensors may still be copied during the next forward pass: those in
            main memory. On the device the copies are made in its own order.
    """
    if rule.spill:
        remedy = "give another folder (config key plugins.spike.spill), or keep fewer (plugins.spike.keep)"
        return Snapshot(DiskBuffers(Path(rule.spill), owner="rollback", remedy=remedy))
    return Snapshot(SnapshotBuffers(rule.where), overlap if rule.where == "host" else None)


def keep_tape(rule: RollbackRule, loader: TrainLoader) -> None:
    """Store the batches that are fetched from now on, or their sample indices.

    Args:
        rule: the plugin's arguments.
        loader: of the run.
    """
    loader.keep_tape((lambda: logger.warning(_OTHER_CONTENT)) if rule.tape == "indices" else None)


def forget_peak(rule: RollbackRule, device: torch.device) -> None:
    """At the start of a fit: let the peak of the device's memory be that of this fit, not of one before with snapshots.

    Args:
        rule: the plugin's arguments.
        device: of the training.
    """
    if is_on_device(rule, device):
        torch.cuda.reset_peak_memory_stats(device)


def taped_batches(rule: RollbackRule, window: int) -> int:
    """The number of micro-batches that may be needed to go back to the oldest snapshot.

    A full ring goes back ``keep * every`` steps. During an incident no snapshot is taken, and excluded batches stay on
    the tape, so there is room for as many steps again.

    Args:
        rule: the plugin's arguments.
        window: micro-batches in the largest step.
    """
    return 2 * rule.keep * rule.every * window


def planned(rule: RollbackRule, sizes: Sizes) -> Planned:
    """What the snapshots will take, for a dry run.

    Args:
        rule: the plugin's arguments.
        sizes: of the run.
    """
    copies = None if sizes.state is None else rule.keep * sizes.state
    batches = taped_batches(rule, sizes.micro_batches)
    taped = None if sizes.batch is None else batches * sizes.batch
    size = "of unknown size" if sizes.state is None else f"of {shown(sizes.state)}"
    place = f"in {rule.spill}" if rule.spill else "on the device" if rule.where == "device" else "in main memory"
    text = f"a snapshot every {rule.every} steps, {rule.keep} of them {size} {place}; up to {batches} batches are kept"
    if rule.tape == "indices":
        text += ", by their sample indices where they can be fetched again"
    if rule.spill or rule.where == "device":
        return Planned(text=text, host_bytes=taped, device_bytes=None if rule.spill else copies)
    return Planned(text=text, host_bytes=total(copies, taped))


def reserve(rule: RollbackRule, ring: SnapshotRing, guard: StepGuard, loader: TrainLoader, batch: Any) -> None:
    """Allocate the memory of all snapshots, so that taking one later costs the copy alone. A collective.

    From then on the data tape is held to the rest of the memory.

    Args:
        rule: the plugin's arguments.
        ring: without reserved memory so far.
        guard: of the run.
        loader: of the run.
        batch: a batch of the training; the memory of the data tape is estimated from its size.

    Raises:
        UserError: on all ranks, if one of them has too little memory.
    """
    trainer, batches = guard.trainer, taped_batches(rule, guard.window.largest)
    plan = MemoryPlan.of(ring.bytes_needed(guard), rule.keep, batch, batches, rule.spill, loader.fetches_again)
    device = next(guard.module.parameters()).device
    on_device, free = is_on_device(rule, device), host_memory() / trainer.num_devices
    problem = plan.device_problem(device, device_memory(device)) if on_device else None
    problem = problem or plan.problem(rule.max_memory, free, on_device)
    if guard.ranks.any(problem is not None):
        raise UserError(
            problem or "rollback: another rank has too little memory for its snapshots; see the error of that rank"
        )
    if trainer.is_global_zero:
        on_disk = f", the snapshots in {rule.spill}" if rule.spill else ""
        logger.info("rollback needs up to %s: %s of memory%s on each rank", plan, shown(plan.memory), on_disk)
    left = plan.left_for_tape(rule.max_memory, free, on_device)
    loader.limit_tape(batches, left, lambda: logger.warning(_TAPE_IS_FULL, batches, shown(left)))
    ring.prepare(guard)


def is_on_device(rule: RollbackRule, device: torch.device) -> bool:
    """Whether snapshots take memory of a device other than main memory."""
    return rule.where == "device" and rule.spill is None and device.type == "cuda"
