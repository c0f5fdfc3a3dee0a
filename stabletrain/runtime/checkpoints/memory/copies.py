"""The copies of a run in the nodes' memory, from its start to its end: what `SaveCheckpoints` calls."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from stabletrain.core.bytes import shown
from stabletrain.errors import UserError
from stabletrain.runtime.checkpoints.collecting import collected, divides_with_dtensors, is_divided
from stabletrain.runtime.checkpoints.data_only import naming_optimizers
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.loading import newest, store_of
from stabletrain.runtime.checkpoints.manifest import CheckpointInfo, Manifest
from stabletrain.runtime.checkpoints.memory import capacity
from stabletrain.runtime.checkpoints.memory.choice import Choice, Chosen
from stabletrain.runtime.checkpoints.memory.exchange import first_problem
from stabletrain.runtime.checkpoints.memory.interval import Interval
from stabletrain.runtime.checkpoints.memory.nodes import Nodes
from stabletrain.runtime.checkpoints.memory.options import MemoryOptions
from stabletrain.runtime.checkpoints.memory.place import IS_SUPPORTED, InUse, Place
from stabletrain.runtime.checkpoints.memory.saver import GENERATIONS, MemorySaver, shard_name
from stabletrain.runtime.checkpoints.store import is_checkpoint
from stabletrain.runtime.guard.attempts import state_is_good
from stabletrain.runtime.internals.shards import held_bytes
from stabletrain.runtime.ranks import Ranks

logger = logging.getLogger("stabletrain")

_KEY = "config key plugins.checkpoints.memory"
_RESTARTS = {"TORCHELASTIC_RESTART_COUNT": 0, "SLURM_RESTART_COUNT": 0, "STABLETRAIN_ATTEMPT": 1}
"""Environment variables that torchrun, SLURM and the launcher set, and their values when nothing was restarted."""


class MemoryCopies:
    """The copies in memory of one fit. Making it and all methods are collectives.

    Args:
        options: with ``every``.
        trainer: in a hook ``setup`` of a fit.
        checkpoints: absolute folder of the run's checkpoints on disk, the same for every attempt of the run.
        recipe: hash of the recipe; None: unknown.
        background: write while training continues.

    Raises:
        UserError: if the options do not fit this run, or another run uses the same folders.
    """

    def __init__(
        self, options: MemoryOptions, trainer: Trainer, checkpoints: Path, recipe: str | None, background: bool
    ) -> None:
        if not IS_SUPPORTED:
            raise UserError(
                f"checkpoints: memory: this system has no file locks, which copies need ({_KEY}.every=null)"
            )
        self._options, self._trainer, self._recipe, self._background = options, trainer, recipe, background
        self._checkpoints = Path(trainer.strategy.broadcast(os.path.realpath(checkpoints)))
        self._ranks, self._nodes = Ranks(trainer), Nodes.of(trainer)
        self._leads = self._nodes.leads(trainer.global_rank)
        self._place = Place(options.root, self._checkpoints, trainer.node_rank)
        self._divided = divides_with_dtensors(trainer)
        self._chosen: Chosen | None = None
        self._resumed = self._searched = False
        self._saver: MemorySaver | None = None
        self._interval: Interval | None = None
        self._last: float | None = None
        self._leftovers: list[Path] = []
        most = max(1, self._nodes.count - 1)
        if options.copies > most:
            raise UserError(
                f"checkpoints: memory.copies must be at most {most} on {self._nodes.count} nodes, got "
                f"{options.copies} ({_KEY}.copies)"
            )
        self.is_on = self._enter()

    def _enter(self) -> bool:
        """Lock the folders of all nodes."""
        problem, in_use = "", ""
        try:
            if self._leads:
                self._place.make()
                self._place.lock()
        except InUse as error:
            in_use = str(error)
        except OSError as error:
            problem = f"{self._place.root} cannot be used ({error.strerror or error})"
        in_use = first_problem(self._ranks.gather(in_use))
        if in_use:
            raise UserError(
                f"checkpoints: another run that is alive writes its copies to {in_use}, since it has the same "
                f"folder of checkpoints, {self._checkpoints}. Wait for its end, or use another folder of checkpoints "
                f"(config key plugins.checkpoints.folder), or another one in memory ({_KEY}.folder)"
            )
        return self._go_without(problem, is_restarted(), f"use another folder ({_KEY}.folder)")

    def _go_without(self, problem: str, started: bool, remedy: str = "") -> bool:
        """Whether there is no problem on any rank. With one, a run that had started before goes on without copies."""
        problem = first_problem(self._ranks.gather(problem))
        if not problem:
            return True
        if not started:
            raise UserError(f"checkpoints: memory: {problem}{': ' if remedy else ''}{remedy}")
        if self._ranks.is_first:
            logger.warning("checkpoints: this run goes on without copies in memory: %s", problem)
        self._place.unlock()
        return False

    # ---- at the start of a fit --------------------------------------------------------------------------------------

    @property
    def is_restored(self) -> bool:
        """Whether this fit goes on from a copy."""
        return self._chosen is not None

    def choose(self) -> Path | None:
        """Where a restarted run without ``ckpt_path`` goes on, for `go_on_from`: from a copy, or from the disk."""
        found = self._newer_than_disk()
        is_on_disk = self._ranks.is_first and newest(self._checkpoints) is not None
        return found or (self._checkpoints if self._trainer.strategy.broadcast(is_on_disk) else None)

    def instead_of(self, path: Any) -> Any:
        """The copy from which this process goes on, if it is newer than what was given; else the same path.

        Args:
            path: a checkpoint, or a folder of checkpoints or a run's folder, which stands for the newest one.
        """
        if self._searched:
            return path
        wanted = self._ranks.is_first and self._means_newest(path)
        if not self._trainer.strategy.broadcast(wanted):
            return path
        return self._newer_than_disk() or path

    def _means_newest(self, path: Any) -> bool:
        """Whether a path stands for the newest checkpoint of this run; one checkpoint does for a restarted run."""
        try:
            given = Path(os.path.realpath(path))
            if is_checkpoint(given):
                found = newest(self._checkpoints)
                return is_restarted() and found is not None and Path(os.path.realpath(found)) == given
            return given == self._checkpoints or store_of(given) == self._checkpoints
        except (OSError, ValueError, TypeError):  # a URL, or no path at all
            return False

    def _newer_than_disk(self) -> Path | None:
        self._searched = True
        if not self.is_on:
            return None
        on_disk = self._trainer.strategy.broadcast(_newest_on_disk(self._checkpoints) if self._ranks.is_first else None)
        name = shard_name(self._trainer.global_rank, self._trainer.world_size, self._divided)
        choice = Choice(self._trainer, self._place, self._nodes, name)

        def accepts(info: CheckpointInfo) -> bool:
            same_recipe = None in (info.recipe, self._recipe) or info.recipe == self._recipe
            same_run = on_disk is not None and info.run == on_disk.run and info.saves >= on_disk.saves
            return same_recipe and same_run

        self._chosen = choice.newest(accepts)
        self._resumed = True
        if self._chosen is None:
            return None
        if self._ranks.is_first:
            received = ", ".join(map(str, self._chosen.received))
            logger.info(
                "checkpoints: goes on from step %d, of a copy in memory%s; %.2f s",
                self._chosen.info.step,
                f"; the parts of ranks {received} came from other nodes" if received else "",
                self._chosen.seconds,
            )
        return self._chosen.path

    def begin(self, restored: bool) -> None:
        """Start copying, in ``on_train_start``; remove what is left of earlier runs.

        Args:
            restored: whether a checkpoint was restored.
        """
        if not self.is_on:
            return
        self._resumed |= restored
        if is_divided(self._trainer) and not self._divided:
            raise UserError(
                "checkpoints: memory: expected an optimizer that every process has whole, or a model that is "
                "divided with DTensors (FSDP2, tensor parallel), got a ZeroRedundancyOptimizer: each process would "
                f"need the parts of all others. Use strategy=fsdp2, or no copies in memory ({_KEY}.every=null)"
            )
        if self._leads:
            self._place.clear(but=None if self._chosen is None else self._chosen.info.copy)
            self._leftovers = self._place.sweep()
        weights = held_bytes(self._trainer.lightning_module.parameters())
        writes = self._divided or self._leads
        self.is_on = self._fits(GENERATIONS * weights if writes else 0, 0)
        if not self.is_on:
            return
        self._saver = MemorySaver(
            self._place, self._trainer, self._nodes, self._options.copies, self._divided, self._background,
        )  # fmt: skip
        assert self._options.every is not None
        self._interval = Interval(self._options.every, self._trainer.global_step)

    def _fits(self, files: int, copies: int, announce: bool = False) -> bool:
        everyone = self._ranks.gather((files, copies))
        mine = [everyone[rank] for rank in self._nodes.mates(self._trainer.global_rank)]
        total_files, total_copies = (sum(each) for each in zip(*mine, strict=True))
        problem = None
        if self._leads:
            problem = capacity.problem_of(self._place, total_files, total_copies, self._leftovers)
        fits = self._go_without(problem or "", self._resumed)
        if fits and announce and self._ranks.is_first:
            others = self._nodes.count - 1 if self._divided else 0
            logger.info(
                "checkpoints: copies in memory take %s of %s on each node (%d generations%s), and %s in its processes",
                shown(total_files),
                self._place.root,
                GENERATIONS,
                f", own parts and those of {min(others, self._options.copies)} other" if others else "",
                shown(total_copies),
            )
        return fits

    def prepare(self) -> None:
        """After the first step: check and announce the memory, and allocate that of the processes.

        Raises:
            UserError: on all ranks, if the copies do not fit on a node, unless the run was resumed.
        """
        if self._saver is None:
            return
        checkpoint = collected(self._trainer, self._divided)
        with naming_optimizers(self._trainer.optimizers):
            files, copies = self._saver.bytes_needed(checkpoint)
            if self._fits(files, copies, announce=True):
                self._saver.prepare(checkpoint)
            else:
                self._saver.close()
                self._saver = None

    # ---- while training ---------------------------------------------------------------------------------------------

    def after_step(self, info: Callable[[], CheckpointInfo]) -> None:
        """Copy the state if that is due, and no plugin finds damage in it.

        Args:
            info: describes the state of now.
        """
        if self._saver is None or self._interval is None:
            return
        now, step = time.monotonic(), self._trainer.global_step
        if self._interval.is_automatic and self._last is not None:
            self._interval.took(now - self._last, self._saver.is_writing)
        if self._interval.due(step) and state_is_good(self._trainer):
            checkpoint = collected(self._trainer, self._divided)
            with naming_optimizers(self._trainer.optimizers):
                self._saver.save(checkpoint, info())
            if self._interval.is_automatic:
                self._interval.saved(step, self._ranks.max(self._interval.wish(time.monotonic() - now)))
        self._last = time.monotonic()

    # ---- at its end -------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait for an unfinished copy."""
        if self._saver is not None:
            self._saver.wait()

    def end(self, saves: int) -> None:
        """The run has come to its end: remove the copies, if its last state is on the disk.

        Args:
            saves: checkpoints that it has begun to save to the disk.
        """
        self.wait()
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        self.discard(saves)

    def discard(self, saves: int = 0) -> None:
        """Remove the copies of this node. No collective: for a run that all ranks have ended by an exception.

        Args:
            saves: as for `end`; without that many on the disk, which may be full, the copies are the newest state.
        """
        self.wait()
        if self._leads and self.is_on:
            on_disk = _newest_on_disk(self._checkpoints) if saves else None
            if saves and (on_disk is None or on_disk.saves < saves):
                logger.warning("checkpoints: the last one is not on the disk, so the copies in memory are kept")
                self._place.unlock()
            else:
                self._place.remove()
        self.is_on = False

    def leave(self) -> None:
        """Give the lock back, and keep the copies for the attempt that follows. No collective."""
        self._place.unlock()


def planned_copies(options: MemoryOptions, trainer: Trainer, state: int | None) -> tuple[str, int | None]:
    """What the copies of a run will take, for a dry run: a sentence, and bytes for each process of a node.

    Args:
        options: with ``every``.
        trainer: whose strategy has set up the model.
        state: bytes of one rank's state; None: not known.

    Returns:
        The files and the copy from which they are written. Without a divided model the first process of a node has
        them for all.
    """
    others = min(options.copies, trainer.num_nodes - 1) if divides_with_dtensors(trainer) else 0
    kept = f", and those of {others} other node{'s' if others > 1 else ''}" if others else ""
    often = "as often as costs 2 % of the time" if options.every == "auto" else f"every {options.every} steps"
    files = None if state is None else (GENERATIONS * (1 + others) + 1) * state
    return f"{GENERATIONS} copies in {options.root} {often}{kept}", files


def is_restarted() -> bool:
    """Whether torchrun, SLURM or the launcher has started this job again, after a process or a node was lost."""
    values = ((os.environ.get(name, ""), first) for name, first in _RESTARTS.items())
    return any(text.isdecimal() and int(text) > first for text, first in values)


def _newest_on_disk(folder: Path) -> CheckpointInfo | None:
    path = newest(folder)
    try:
        return None if path is None else Manifest.read(path).info
    except CheckpointError:
        return None
