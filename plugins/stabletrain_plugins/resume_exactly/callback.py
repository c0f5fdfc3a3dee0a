"""The callback `ResumeExactly`: what it saves in a checkpoint, and how a fit resumes from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from stabletrain.errors import UserError, require
from stabletrain.runtime import rng
from stabletrain.runtime.checkpoints.lightning_io import load_onto_cpu
from stabletrain.runtime.data.epoch_state import EpochState
from stabletrain.runtime.data.loads import Loads
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import restart as restart_internals
from stabletrain.runtime.internals import resuming
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.fabric import refuse_in_fabric
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.plugin_state import names_its_plugin
from stabletrain_plugins.resume_exactly import gradient_buckets
from stabletrain_plugins.resume_exactly.gradient_buckets import GradientBuckets
from stabletrain_plugins.resume_exactly.hidden_tensors import HiddenTensors
from stabletrain_plugins.resume_exactly.optimizer_state import OptimizerState
from stabletrain_plugins.resume_exactly.requeue_signal import RequeueSignal
from stabletrain_plugins.resume_exactly.saved_state import SavedState, problem_of
from stabletrain_plugins.resume_exactly.step_watch import StepWatch
from stabletrain_plugins.resume_exactly.trained import Trained

FastForward: TypeAlias = Literal["auto", "indices", "batches"]

_NAME = "resume_exactly"
_OPT_OUT = "remove ResumeExactly (config key plugins.resume=none)"


@refuse_in_fabric
class ResumeExactly(Callback):
    """``Trainer.fit(ckpt_path=...)`` resumes at the right batch with the right random numbers.

    Add it to the run that saves checkpoints and to the one that resumes. With the same code, versions, number of
    processes, batch size, threads and hardware the resumed run is bit-identical to an uninterrupted one. Lightning
    alone restarts the epoch's data, with other random numbers.

    Args:
        fast_forward: how the batches before the checkpoint are skipped on resume. ``"auto"``: without fetching them if
            a map-style dataset is read in the training process; otherwise they are fetched and dropped, because worker
            processes that draw random numbers must draw them all. ``"indices"``: without fetching them, also if
            workers read a map-style dataset; exact if these draw no random numbers. ``"batches"``: always fetch them;
            for a dataset that counts its calls.

    Raises:
        UserError: at the first step of a resumed fit, if the train loader differs from that of the checkpoint.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[ResumeExactly()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self, fast_forward: FastForward = "auto") -> None:
        known = fast_forward in ("auto", "indices", "batches")
        expected = '"auto", "indices" or "batches"'
        require(known, _NAME, "fast_forward", expected, fast_forward, "plugins.resume", "ResumeExactly")
        self.fast_forward: FastForward = fast_forward
        self._reset()

    def _reset(self) -> None:
        self._trainer: Trainer | None = None
        self._module: LightningModule | None = None
        self._loader: TrainLoader | None = None
        self._loads: Loads | None = None
        self._epoch: EpochState | None = None
        self._hidden: HiddenTensors | None = None
        self._trained: Trained | None = None
        self._optimizer_state: OptimizerState | None = None
        self._buckets: GradientBuckets | None = None  # remains after the fit, as what may still be saved
        self._step: StepWatch | None = None
        self._requeue: RequeueSignal | None = None
        self._undo: list[Callable[[], None]] = []
        self._before_validation: rng.QuickState | None = None  # while one runs, until its end
        self._final: dict[str, Any] | None = None  # the state of a fit that has ended, which may still be saved
        self._loaded: SavedState | None = None
        self._restoring_own = self._warned_of_step = False

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return _NAME

    # ---- the fit ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the train loaders and validation."""
        if stage != "fit":
            return
        self._close()
        self._reset()
        if trainer.precision_plugin.precision == "64-true":
            # Lightning does this after it has loaded a checkpoint, whose numbers are rounded to float32 by then
            trainer.precision_plugin.convert_module(pl_module)
        self._trainer, self._module = trainer, trainer_internals.unwrapped(pl_module)
        self._loader = TrainLoader.of(trainer)
        self._loader.record_positions(self.fast_forward, _NAME, _OPT_OUT)
        self._loads = Loads(trainer)
        self._hidden = HiddenTensors(trainer, self._module, _NAME)
        self._trained = Trained(self._module)
        self._optimizer_state = OptimizerState(trainer, self._module, _NAME)
        self._buckets = GradientBuckets(trainer, _NAME)
        self._requeue = RequeueSignal(trainer)
        self._undo = [
            self._loader.close,
            self._loads.close,
            self._buckets.close,
            load_onto_cpu(trainer),
            resuming.before_batch(trainer, self._start_batch),
            resuming.around_own_restore(trainer, self._begin_own_restore, self._end_own_restore),
            loader_internals.after_train_start(trainer, self._on_loop_start),
            loader_internals.around_validation(trainer, self._begin_validation, self._end_validation),
        ]
        self._epoch = EpochState(trainer, _NAME)
        self._undo.append(self._epoch.close)
        self._step = StepWatch(trainer, self._module, self._loader, self._epoch)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the optimizers' states are loaded: give them the parameters that they had at the checkpoint."""
        if self._trained is not None:
            self._trained.on_fit_start(trainer.optimizers)
        if self._optimizer_state is not None:
            self._optimizer_state.on_fit_start(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the loaders against the checkpoint, and continue where it was saved."""
        if self._loader is None or self._requeue is None:
            return
        self._requeue.take_over()
        for loader in self._loader.loaders:
            _refuse_own_state(loader.loader)
        if self._loaded is not None:
            self._loader.check_positions()
            self._undo.append(loader_internals.silence_resume_warning(trainer))
            loader_internals.begin_next_epoch(trainer)
        elif trainer_internals.resumes_from_checkpoint(trainer) and resuming.batch_count(trainer).run:
            rank_zero_warn(
                f"{_NAME}: the checkpoint holds no state of ResumeExactly, so the epoch's data restart at the first "
                "batch, with other random numbers. Checkpoints saved from now on resume exactly."
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """From here on the step changes the weights."""
        if self._step is not None:
            self._step.update_begins()
        if self._optimizer_state is not None:
            self._optimizer_state.update_begins()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the state, because a checkpoint may be saved after the end of the run."""
        self._finish()
        if self._requeue is not None:
            self._requeue.run_if_received()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unwrap the train loaders and validation."""
        if self._loader is not None and self._loaded is not None and self._final is None:
            self._finish()  # the run had ended at the checkpoint: Lightning does not enter the loop
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unwrap; after an exception Lightning calls no teardown, and may still save a checkpoint."""
        if self._loader is not None and self._final is None:
            self._final = self._current_state()
        self._close()

    def _finish(self) -> None:
        self._final = self._current_state()
        rng.restore(self._final["rng"])  # if no batch was left, they were not restored yet

    def _close(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._loader = self._loads = self._epoch = self._hidden = None
        self._trained = self._optimizer_state = self._step = self._requeue = None

    def _on_loop_start(self) -> None:
        if self._loader is None or self._trainer is None or trainer_internals.is_trial(self._trainer):
            return
        assert self._hidden is not None
        assert self._trained is not None
        self._loader.on_loop_start()
        self._hidden.on_loop_start()
        assert self._optimizer_state is not None
        self._trained.on_loop_start()
        self._optimizer_state.on_loop_start()

    def _start_batch(self) -> None:
        assert self._step is not None
        assert self._requeue is not None
        self._step.start_batch()
        self._requeue.run_if_received()

    def _begin_validation(self) -> None:
        if self._trainer is None or self._trainer.sanity_checking or self._step is None or self._requeue is None:
            return
        self._before_validation = rng.capture_quickly()
        self._requeue.run_if_received()
        self._step.validation_begins()

    def _end_validation(self) -> None:
        self._before_validation = None

    # ---- a restore within the fit, as of a finder -------------------------------------------------------------------

    def _begin_own_restore(self) -> None:
        self._restoring_own = True

    def _end_own_restore(self) -> None:
        """The run was set back to before trial steps, or to an earlier step: nothing of ours has to follow."""
        self._restoring_own = False
        if self._step is not None:
            self._step.clear()
        if self._loaded is not None and self._loader is not None and not self._loader.has_started:
            self._resume_from(self._loaded)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Data positions and random generators of all ranks. A collective: call it on all ranks."""
        here = self._current_state() if self._loader is not None else self._final
        if here is None:
            return {}
        self._warn_of(problem_of(here))
        everyone: list[Any] = [here]
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes > 1:
            everyone = [None] * processes
            dist.all_gather_object(everyone, here)
        return {"ranks": everyone, **self._gradient_buckets(between_steps=here["unfinished"] is None)}

    def _gradient_buckets(self, between_steps: bool) -> dict[str, Any]:
        in_fit = self._loader is not None
        found = None if self._buckets is None else self._buckets.state(between_steps and in_fit)
        return {} if found is None else {"buckets": found}

    @names_its_plugin
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint: called by Lightning before the first batch."""
        if self._loader is None or self._trainer is None or self._restoring_own:
            return
        everyone = state_dict["ranks"]
        if not isinstance(everyone, list) or not everyone:
            raise TypeError("expected a list of the states of all ranks")
        rank, size = self._trainer.global_rank, self._trainer.world_size
        if len(everyone) != size:
            rank_zero_warn(
                f"{_NAME}: the checkpoint was saved by {len(everyone)} processes, and training resumes with {size}: "
                "random numbers differ, as those of dropout. To resume exactly, use the same number of processes."
            )
        saved = SavedState.of(everyone[rank % len(everyone)])
        if saved is not None and len(everyone) != size:
            self._loader.warn_of_unknown_order(saved.positions)
        if saved is None:
            rank_zero_warn(
                f"{_NAME}: the checkpoint is of another version of stabletrain: its data position is not read"
            )
            return
        problem = next((each for each in map(problem_of, everyone) if each), "")
        if problem:
            raise UserError(
                f"{_NAME}: this checkpoint was saved in the middle of an optimizer step, and cannot be resumed "
                f"exactly: {problem}. Use another checkpoint, or {_OPT_OUT}: training then goes on with what the step "
                "had done"
            )
        if len(everyone) != size:
            self._resume_from(saved.for_another_world(has_rng=rank < len(everyone)))
            return
        if "buckets" in state_dict and self._buckets is not None:
            self._buckets.load(gradient_buckets.checked(state_dict["buckets"]))
        self._resume_from(saved)

    def _resume_from(self, saved: SavedState) -> None:
        assert self._loader is not None
        assert self._loads is not None
        assert self._module is not None
        self._loader.resume_at(saved.positions, saved.rng)
        self._loads.repeat(saved.loads)
        if saved.hidden is not None and self._hidden is not None:
            self._hidden.load(saved.hidden)
        if saved.trained is not None and self._trained is not None:
            self._trained.load(saved.trained)
        if self._optimizer_state is not None:
            self._optimizer_state.load(saved.optimizers)
        if saved.epoch is not None and self._epoch is not None:
            self._epoch.load(saved.epoch, saved.unfinished)
        for name, value in saved.buffers.items():
            self._module.get_buffer(name).copy_(value)
        self._loaded = saved

    def _current_state(self) -> dict[str, Any]:
        assert self._loader is not None
        assert self._loads is not None
        assert self._epoch is not None
        assert self._hidden is not None
        assert self._trained is not None
        assert self._step is not None
        assert self._trainer is not None
        loads = {name: each._asdict() for name, each in self._loads.done.items()}
        state: dict[str, Any] = {"loads": loads, "unfinished": None, "hidden": self._hidden.state()}
        assert self._optimizer_state is not None
        state["trained"], state["optimizers"] = self._trained.state(), self._optimizer_state.state()
        if self._step.in_step:
            return state | self._step.state(list(state["hidden"]))
        if self._before_validation is not None and not restart_internals.validation_is_complete(self._trainer):
            state["rng"] = self._before_validation.to_state()  # it will be run again from its first batch
        else:
            state["rng"] = self._loader.run_rng
        positions = [position.to_plain() for position in self._loader.positions()]
        return {**state, "loaders": positions, "epoch": self._epoch.state_dict()}

    def _warn_of(self, problem: str) -> None:
        if problem and not self._warned_of_step:
            self._warned_of_step = True
            rank_zero_warn(
                f"{_NAME}: this checkpoint is saved in the middle of an optimizer step, and it will not be possible to "
                f"resume exactly from it: {problem}. Save after a step"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies do not include the running fit."""
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _refuse_own_state(loader: Any) -> None:
    if not isinstance(loader, DataLoader) and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        raise UserError(
            f"{_NAME}: the train loader must be a DataLoader or have no state_dict, got {type(loader).__name__}, which "
            "saves its own position: counting its batches may not lead to the same one. Wrap its dataset in a "
            f"DataLoader, or {_OPT_OUT}: Lightning then restores the loader's own state."
        )
