"""Checkpoints at intervals, after validation, on SIGTERM and at the end of a run."""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, cast

from lightning.pytorch import LightningModule, Trainer

from stabletrain.core import metric_names
from stabletrain.core.intervals import SaveTriggers
from stabletrain.core.lengths import LengthLike
from stabletrain.core.planned import Planned, Sizes, total
from stabletrain.errors import UserError, require
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.checkpoints.agreement import Together
from stabletrain.runtime.checkpoints.collecting import collected, divides_with_dtensors, is_divided
from stabletrain.runtime.checkpoints.data_only import naming_optimizers
from stabletrain.runtime.checkpoints.divided_saver import DividedSaver
from stabletrain.runtime.checkpoints.going_on import GoOn, Trained
from stabletrain.runtime.checkpoints.lightning_io import check_when_reading
from stabletrain.runtime.checkpoints.loading import newest
from stabletrain.runtime.checkpoints.manifest import CheckpointInfo
from stabletrain.runtime.checkpoints.memory.copies import MemoryCopies, is_restarted, planned_copies
from stabletrain.runtime.checkpoints.memory.options import OFF, MemoryOptions
from stabletrain.runtime.checkpoints.preemption import EXIT_CODE, PreemptionWatch, StopBetweenBatches
from stabletrain.runtime.checkpoints.saver import Saver
from stabletrain.runtime.checkpoints.store import MetricMode, Retention, Store
from stabletrain.runtime.data.epoch_state import EpochState
from stabletrain.runtime.guard.attempts import state_is_good
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import resuming, sigterm
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.fabric import refuse_in_fabric
from stabletrain.runtime.internals.packages import Checkpoint
from stabletrain.runtime.plugin_state import names_its_plugin
from stabletrain.runtime.ranks import Ranks
from stabletrain.runtime.records import run_files
from stabletrain.runtime.records.recipe import recipe_hash
from stabletrain.runtime.records.writable import unwritable
from stabletrain.runtime.run_length import run_length
from stabletrain.runtime.signal_watch import Interrupted, Terminated
from stabletrain.runtime.stop import EndReached, TrainingStopped
from stabletrain.settings import worded_of

if TYPE_CHECKING:
    from stabletrain.runtime.internals.packages import AnyTrainer

logger = logging.getLogger("stabletrain")

_EVERY = "save_checkpoints.every"
"""Name of the argument ``every`` in messages."""


@refuse_in_fabric
class SaveCheckpoints(StopBetweenBatches, Checkpoint):
    """Save checkpoints that are complete or absent, verified when they are read, and written while training continues.

    It replaces ModelCheckpoint. To resume from the newest good one: ``Trainer.fit(model, ckpt_path=folder)``; or with
    ``resume="auto"``, each time the script is started.

    Args:
        folder: where checkpoints go; None: ``checkpoints`` in the logger's folder, or in ``default_root_dir``; with
            ``resume="auto"`` always in ``default_root_dir``, since a logger has another folder after each start.
        every: an interval or a list of them: applied steps (``500``), epochs (``"1ep"``), tokens (``"1e9tok"``), a
            share of the run (``"2%"``), or a time (``"30s"``, ``"10min"``, ``"2h"``); None: only at the end of the run.
        keep_last: number of the newest checkpoints to keep, >= 1; with 1, there is none to fall back to if it is
            damaged. None: all.
        monitor: name of a metric: a checkpoint is saved after each validation with the best value so far, and the best
            one is kept too. None: no metric.
        mode: whether the smallest (``"min"``) or the largest (``"max"``) value of ``monitor`` is best.
        tokens_per_step: tokens in one step over all ranks, > 0; only for intervals in tokens.
        background: write from a copy in memory, which takes as much memory as the checkpoint, on rank 0; of a divided
            model (FSDP2, tensor parallel) or optimizer (ZeroRedundancyOptimizer), as this rank's part, on each rank.
            False: training waits for every write.
        on_sigterm: on SIGTERM save after the batch, and end the process with exit code 143.
        resume: ``"auto"``: a fit goes on from the newest good checkpoint of the folder, if there is one, unless it was
            given a ``ckpt_path``. A second fit of the same Trainer goes on from where it is. None: only from a
            ``ckpt_path``.
        memory: copies in the nodes' memory, from which a restarted run goes on, also after the loss of a node: a
            mapping with ``every`` (applied steps, ``"auto"``: as often as costs at most 2 % of the steps' time, or
            None: no copies), ``folder`` (on a memory file system; None: ``/dev/shm``) and ``copies`` (number of other
            nodes that keep each part of a divided model). None: no copies.

    Raises:
        UserError: for an argument out of range; in ``fit``, if the folder cannot be written, or if the newest
            checkpoint is of another recipe (with ``resume="auto"``).
    """

    plugin: ClassVar[str] = "save_checkpoints"
    slot: ClassVar[str] = "checkpoints"

    _undo_reading: Callable[[], None] | None = None
    _undo_choice: Callable[[], None] | None = None
    _epoch: EpochState | None = None
    _trained: Trained | None = None
    _go_on: GoOn | None = None

    def __init__(
        self,
        folder: str | Path | None = None,
        every: LengthLike | Sequence[LengthLike] | None = "10min",
        keep_last: int | None = 2,
        monitor: str | None = None,
        mode: MetricMode = "min",
        tokens_per_step: float | None = None,
        background: bool = True,
        on_sigterm: bool = True,
        resume: Literal["auto"] | None = None,
        memory: Mapping[str, Any] | None = OFF,
    ) -> None:
        finite = tokens_per_step is None or 0 < tokens_per_step < math.inf
        for ok, argument, expected, got in (
            (keep_last is None or keep_last >= 1, "keep_last", ">= 1, or null for all", keep_last),
            (mode in ("min", "max"), "mode", '"min" or "max"', mode),
            (finite, "tokens_per_step", "> 0 and finite, or null", tokens_per_step),
            (resume in ("auto", None), "resume", '"auto" or null', resume),
        ):
            require(ok, self.plugin, argument, expected, got, f"plugins.{self.slot}", type(self).__name__)
        self.folder, self.every, self.keep_last = folder, every, keep_last
        self.monitor, self.mode = monitor, mode
        self.tokens_per_step, self.background, self.on_sigterm = tokens_per_step, background, on_sigterm
        self.resume = resume
        self.memory = MemoryOptions.of(memory).as_dict()
        SaveTriggers(every, _EVERY)
        self._reset()

    def _reset(self) -> None:
        self._active = self._checked = self._watching = self._divided = False
        self._triggers = SaveTriggers(self.every, _EVERY)
        self._watch = PreemptionWatch()
        self._saver: Saver | None = None
        self._directory: Path | None = None
        self._told_best = ""
        self._looked_at = 0  # at the clock, in batches
        self._saved_at: tuple[int, int] | None = None
        self._run = secrets.token_hex(8)
        self._fitted: weakref.ref[Trainer] | None = None
        self._recipe: str | None = None
        self._loaded_recipe: str | None = None
        self._saves = 0
        self._copies: MemoryCopies | None = None

    # ---- for users --------------------------------------------------------------------------------------------------

    def planned(self, trainer: Trainer, sizes: Sizes) -> Planned:
        """What it will do, for a dry run.

        Args:
            trainer: of the traced steps.
            sizes: of the run.
        """
        every = self.every if isinstance(self.every, list | tuple) else [self.every]
        when = "at the end only" if self.every is None else "every " + " and every ".join(map(_shown, every))
        kept = "all are kept" if self.keep_last is None else f"the newest {self.keep_last} are kept"
        best = f", and the best by {self.monitor}" if self.monitor else ""
        text, held = f"a checkpoint {when}; {kept}{best}", sizes.state if self.background else None
        options = MemoryOptions.of(self.memory)
        if options.every is not None:
            more, copies = planned_copies(options, trainer, sizes.state)
            text, held = f"{text}; {more}", total(held or 0, copies)
        return Planned(text=text, host_bytes=held)

    @property
    def last(self) -> str | None:
        """The newest complete checkpoint, for ``ckpt_path``; None if there is none yet."""
        folder = self._directory or (Path(self.folder) if self.folder is not None else None)
        found = newest(folder) if folder is not None else None
        return None if found is None else str(found)

    @property
    def best_model_path(self) -> str:
        """The best checkpoint by ``monitor``, or the newest if there is none; used for ``ckpt_path="best"``."""
        best = None if self._saver is None else self._saver.best(self._run)
        return str(best.path) if best else self._told_best or self.last or ""

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Lightning sets it in a process that started the ranks by spawn or fork, where nothing was trained."""
        self._told_best = path
        if path:
            self._directory = Path(path).parent

    def save(self, trainer: AnyTrainer, *, wait: bool = False, value: float | None = None) -> Path | None:
        """Save a checkpoint now. Call it on all ranks, between batches.

        If the checkpoint cannot be written, a warning is logged and training continues. If a plugin finds the weights
        damaged (`CheckReplicas`), none is saved either.

        Args:
            trainer: in a fit.
            wait: return when it is on the disk.
            value: of the monitored metric, if a validation has just ended.

        Returns:
            The newest complete checkpoint, on rank 0 with ``wait``; else None.
        """
        return self._save(cast(Trainer, trainer), wait, value)

    def _save(self, trainer: Trainer, wait: bool, value: float | None) -> Path | None:
        if not state_is_good(trainer):
            if trainer.is_global_zero:
                logger.warning(
                    "save_checkpoints: no checkpoint is saved at step %d: its weights may be damaged (see the event)",
                    trainer.global_step,
                )
            return None
        self._saves += 1
        checkpoint = collected(trainer, self._divided)
        self._saved_at = _position(trainer)
        self._triggers.saved(time.monotonic())
        if self._saver is not None:
            with naming_optimizers(trainer.optimizers):
                self._saver.save(checkpoint, self._info(trainer, value), wait)
        if wait:
            trainer.strategy.barrier("stabletrain.save_checkpoints")
        return self._saver.newest if self._saver is not None and wait else None

    def _info(self, trainer: Trainer, value: float | None = None) -> CheckpointInfo:
        return CheckpointInfo(
            step=trainer.global_step,
            run=self._run,
            epoch=trainer.current_epoch,
            world_size=trainer.world_size,
            recipe=self._recipe,
            metric=None if value is None else self.monitor,
            value=value,
            whole=not AccumulationWindow(trainer).is_open,
            saves=self._saves,
            trained={} if self._trained is None else self._trained.description,
        )

    def wait(self) -> None:
        """Wait for an unfinished write."""
        if self._saver is not None:
            self._saver.wait()

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let ``ckpt_path`` accept folders of checkpoints, and determine the folder to write to."""
        if trainer_internals.reads_own_checkpoints(trainer) and not divides_with_dtensors(trainer):
            raise UserError(
                "save_checkpoints: expected a strategy that gathers the checkpoint on rank 0, or divides the model "
                f"with DTensors (FSDP2, tensor parallel), got {type(trainer.strategy).__name__}, which writes its own "
                "format. Use Lightning's ModelCheckpoint (plugins/checkpoints=none), or strategy=ddp"
            )
        self._restore_reading()  # of a fit that an exception has ended
        self._undo_reading = check_when_reading(trainer, self._instead_of)
        if stage != "fit":
            return
        run = self._run if self._fitted is not None and self._fitted() is trainer else None
        self._reset()
        self._run, of_tuner = run or self._run, resuming.is_tuners_fit(trainer)
        self._fitted = None if of_tuner else weakref.ref(trainer)
        root = trainer.default_root_dir
        if self.resume is None:
            root = trainer.log_dir or root  # a collective, so it is called on every rank
        self._directory = (
            (Path(root) / run_files.CHECKPOINTS if self.folder is None else Path(self.folder)).expanduser().absolute()
        )
        self._active = not trainer_internals.is_fast_dev_run(trainer)
        if self._active:
            self._require_writable(trainer)
        if not EpochState.is_kept(trainer):  # another plugin that resumes keeps it in its own state
            self._epoch = EpochState(trainer, self.plugin)
        self._recipe = recipe_hash(Path(trainer.default_root_dir), but=("chaos",))
        if self.resume == "auto" and self._active and run is None and not of_tuner:
            names = {"owner": self.plugin, "key": f"plugins.{self.slot}", "named": type(self).__name__}
            self._go_on = GoOn(trainer, self._directory, self._recipe, **names)
            self._trained = self._go_on.trained
        else:
            self._trained = Trained(trainer)
        options = MemoryOptions.of(self.memory)
        if self._active and options.every is not None and not of_tuner:
            self._require_lasting_folder(Path(root))
            self._copies = MemoryCopies(options, trainer, self._directory, self._recipe, self.background)
            if is_restarted() and self._go_on is None:
                self._undo_choice = resuming.go_on_from(trainer, self._copies.choose)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the intervals and handle SIGTERM: the run's length is known, and Lightning's handlers are installed."""
        if self._epoch is not None and self._epoch.is_loaded:
            loader_internals.begin_next_epoch(trainer)
        if not self._active:
            return
        from_memory = self._copies is not None and self._copies.is_restored
        if self._go_on is not None and self._go_on.has_gone_on and not from_memory:
            self._saved_at = _position(trainer)  # in this folder
        self._saver = self._new_saver(trainer)
        if self._copies is not None:
            self._copies.begin(restored=trainer.global_step > 0)
        run = run_length(trainer, self.tokens_per_step)
        self._triggers.start(run, trainer.global_step, time.monotonic())
        self._watching = self.on_sigterm and self._watch.take_over(trainer)
        # decides whether collectives are called, so all ranks must agree
        self._watching = bool(trainer.strategy.broadcast(self._watching))
        if self._watching:
            self.take_over(trainer)
        if self._saver is not None and trainer.is_global_zero:
            self._saver.begin(self._run)
            if self._loaded_recipe and self._recipe and self._loaded_recipe != self._recipe:
                logger.warning(
                    "save_checkpoints: the checkpoint was made with another recipe than this run's: compare the "
                    "run.yaml of both runs"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due; with accumulation, only after the optimizer step."""
        if not self._active or AccumulationWindow(trainer).is_open:
            return
        if not self._checked:
            self._check_and_allocate(trainer)
            if self._copies is not None and not self._saves:
                self.save(trainer)  # copies are of the run whose checkpoints are on disk, so there must be one
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._is_due(trainer) or 0 < trainer.max_steps <= trainer.global_step:
            self.save(trainer)
        if self._copies is not None:
            self._copies.after_step(lambda: self._info(trainer))

    @property
    def may_stop(self) -> bool:
        """True from the first step on, if this plugin handles SIGTERM."""
        return self._active and self._watching and self._checked

    @property
    def asked_to_stop(self) -> bool:
        """Whether this process has received SIGTERM."""
        return self._watch.received

    def save_and_stop(self, trainer: Trainer) -> NoReturn:
        """Save a checkpoint, and end the process with the exit code of a SIGTERM."""
        path = self.save(trainer, wait=True)
        if self._copies is not None:
            self._copies.end(self._saves)
        logger.warning("SIGTERM: ending with exit code %d; resume from %s", EXIT_CODE, path or self.last)
        raise Terminated(EXIT_CODE)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the monitored metric has its best value so far."""
        if not self._active or self.monitor is None or trainer.sanity_checking:
            return
        metric = metric_names.find(self.monitor, trainer.callback_metrics)
        if metric is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise UserError(
                f"save_checkpoints: monitor must be a metric that is logged until the end of validation, got "
                f"{self.monitor!r}; there are: {known} (config key plugins.checkpoints.monitor)"
            )
        value = float(trainer.strategy.broadcast(float(trainer.callback_metrics[metric])))
        is_best = self._saver is not None and trainer.is_global_zero and self._saver.is_best(self._run, value)
        if trainer.strategy.broadcast(is_best):
            self.save(trainer, value=value)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run, unless it is saved already, and wait until it is on the disk."""
        if not self._active:
            return
        if self._saved_at != _position(trainer):
            self.save(trainer)
        self.wait()
        trainer.strategy.barrier("stabletrain.save_checkpoints")
        if self._saver is not None:
            self._saver.close()
        if self._copies is not None:
            self._copies.end(self._saves)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish an unfinished write; the state of a failed run is not saved."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, UserError) and len(exception.args) == 1:
            exception.args = (worded_of(str(exception), self),)
        self.wait()
        agreed = isinstance(exception, Interrupted) and exception.agreed
        if self._copies is not None and (agreed or isinstance(exception, TrainingStopped | EndReached)):
            self._copies.discard(self._saves if agreed else 0)  # nobody restarts such a run

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish an unfinished write, and restore the strategy's own CheckpointIO."""
        super().teardown(trainer, pl_module, stage)
        self.wait()
        self._restore_reading()

    def state_dict(self) -> dict[str, Any]:
        """The identity of the run and of its recipe, and the state of the epoch. A collective."""
        known: dict[str, Any] = {"run": self._run, "recipe": self._recipe, "saves": self._saves}
        return known if self._epoch is None else {**known, "epoch": self._epoch.state_of_all_ranks()}

    @names_its_plugin
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the identity of the run that is resumed."""
        run, recipe = state_dict["run"], state_dict["recipe"]
        if not isinstance(run, str) or not isinstance(recipe, str | None):
            raise TypeError("run and recipe must be text")
        if type(saves := state_dict.get("saves", 0)) is not int:
            raise TypeError("saves must be a whole number")
        self._run, self._loaded_recipe, self._saves = run, recipe, saves
        if self._epoch is not None and state_dict.get("epoch"):
            self._epoch.load_rank(state_dict["epoch"])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy only the arguments, not the state of a running fit."""
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _require_writable(self, trainer: Trainer) -> None:
        """Before training, not at the first checkpoint, which may be hours later."""
        assert self._directory is not None
        if problem := Together(trainer).first_problem(
            unwritable(str(self._directory), folder=True, parents=True) or ""
        ):
            raise UserError(f"save_checkpoints: {problem}; use another folder (config key plugins.checkpoints.folder)")

    def _require_lasting_folder(self, root: Path) -> None:
        """A logger's folder of one start of a script is not that of the next, so copies would not be found again."""
        if self.folder is None and re.fullmatch(r"version_\d+", root.name):
            raise UserError(
                "save_checkpoints: with copies in memory, folder must be given, as the logger has a new folder at each "
                f"start ({root}): a restarted run would not find its copies (config key plugins.checkpoints.folder)"
            )

    def _instead_of(self, path: Any) -> Any:
        return path if self._copies is None else self._copies.instead_of(path)

    def _restore_reading(self) -> None:
        if self._undo_choice is not None:
            self._undo_choice()
            self._undo_choice = None
        if self._copies is not None:
            self._copies.leave()
            self._copies = None
        if self._undo_reading is not None:
            self._undo_reading()
            self._undo_reading = None
        for each in (self._epoch, self._go_on or self._trained):
            if each is not None:
                each.close()
        self._epoch = self._trained = self._go_on = None

    def _new_saver(self, trainer: Trainer) -> Saver | None:
        """On rank 0, or on all if each has a part of the state."""
        assert self._directory is not None
        store = Store(self._directory, Retention(last=self.keep_last, metric=self.monitor, mode=self.mode))
        self._divided, setting = is_divided(trainer), f"the interval ({_EVERY})"
        if self._divided:
            return DividedSaver(store, trainer, self.background, setting)
        return Saver(store, self.background, setting) if trainer.is_global_zero else None

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether a checkpoint is due, by the clock of any rank; the same on all ranks."""
        if self._triggers.seconds is None or not sigterm.is_asked_after_batch(trainer, self._looked_at):
            return self._triggers.due(trainer.global_step, now=-math.inf)
        self._looked_at = trainer_internals.batches_seen(trainer)
        return Ranks(trainer).any(self._triggers.due(trainer.global_step, time.monotonic()))

    def _check_and_allocate(self, trainer: Trainer) -> None:
        """After the first step: raise an error for state that cannot be saved, and allocate the memory for the copy."""
        self._checked = True
        checkpoint = collected(trainer, self._divided)
        if self._saver is not None:
            with naming_optimizers(trainer.optimizers):
                self._saver.prepare(checkpoint)
        if self._copies is not None:
            self._copies.prepare()


def _position(trainer: Trainer) -> tuple[int, int]:
    return trainer.global_step, trainer_internals.batches_seen(trainer)


def _shown(interval: LengthLike) -> str:
    return f"{interval} steps" if str(interval).isdigit() else str(interval)
