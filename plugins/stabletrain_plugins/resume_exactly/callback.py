"""The callback `ResumeExactly`: what it saves in a checkpoint, and how a fit resumes from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from stabletrain.errors import UserError, require
from stabletrain.runtime import rng
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.data.epoch_state import EpochState
from stabletrain.runtime.data.position import LoaderState
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.plugin_state import names_its_plugin

FastForward: TypeAlias = Literal["auto", "indices", "batches"]

_NAME = "resume_exactly"
_OPT_OUT = "remove ResumeExactly (config key plugins.resume=none)"


class ResumeExactly(Callback):
    """``Trainer.fit(ckpt_path=...)`` resumes at the right batch with the right random numbers.

    Add it to the run that saves checkpoints and to the one that resumes. With the same code, versions, number of
    processes, batch size, threads and hardware the resumed run is bit-identical to an uninterrupted one. Lightning
    alone restarts the epoch's data, with other random numbers. Validation no longer changes the random numbers of
    training.

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
        require(known, _NAME, "fast_forward", expected, fast_forward, "plugins.resume")
        self.fast_forward: FastForward = fast_forward
        self._trainer: Trainer | None = None
        self._loader: TrainLoader | None = None
        self._epoch: EpochState | None = None
        self._undo: list[Callable[[], None]] = []
        self._training_rng: rng.RngState | None = None  # state of the training's generators while validation runs
        self._final: dict[str, Any] | None = None  # the state of a fit that has ended, which may still be saved
        self._loaded = False
        self._warned_of_window = False

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
        self._trainer, self._final, self._loaded = trainer, None, False
        self._loader = TrainLoader.of(trainer)
        self._loader.record_positions(self.fast_forward, _NAME, _OPT_OUT)
        self._undo = [
            self._loader.close,
            loader_internals.after_train_start(trainer, self._loader.on_loop_start),
            loader_internals.around_validation(trainer, self._stash_rng, self._restore_rng),
        ]
        self._epoch = EpochState(trainer, _NAME)
        self._undo.append(self._epoch.close)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the loaders against the checkpoint."""
        if self._loader is None:
            return
        for loader in self._loader.loaders:
            _refuse_own_state(loader.loader)
        if self._loaded:
            self._loader.check_positions()
            self._undo.append(loader_internals.silence_resume_warning(trainer))
            loader_internals.begin_next_epoch(trainer)
        elif trainer_internals.resumes_from_checkpoint(trainer):
            rank_zero_warn(
                f"{_NAME}: the checkpoint holds no state of ResumeExactly, so the epoch's data restart at the first "
                "batch, with other random numbers. Checkpoints saved from now on resume exactly."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the state, because a checkpoint may be saved after the end of the run."""
        self._finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unwrap the train loaders and validation."""
        if self._loader is not None and self._loaded and self._final is None:
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
        self._loader = self._epoch = None

    def _stash_rng(self) -> None:
        assert self._loader is not None
        self._training_rng = self._loader.run_rng

    def _restore_rng(self) -> None:
        if self._training_rng is not None:
            rng.restore(self._training_rng)
            self._training_rng = None

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Data positions and random generators of all ranks. A collective: call it on all ranks."""
        here = self._current_state() if self._loader is not None else self._final
        if here is None:
            return {}
        everyone: list[Any] = [here]
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes > 1:
            everyone = [None] * processes
            dist.all_gather_object(everyone, here)
        return {"ranks": everyone}

    @names_its_plugin
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint: called by Lightning before the first batch."""
        if self._loader is None or self._trainer is None:
            return
        everyone = state_dict["ranks"]
        if not isinstance(everyone, list) or not everyone:
            raise TypeError("expected a list of the states of all ranks")
        rank, size = self._trainer.global_rank, self._trainer.world_size
        if len(everyone) != size:
            rank_zero_warn(
                f"{_NAME}: the checkpoint was saved by {len(everyone)} processes, and training resumes with {size}. "
                "Each resumes at the same batch number of its own data, so samples of this epoch may be used twice or "
                "not at all, and random numbers differ. To resume exactly, use the same number of processes, or a "
                "checkpoint saved at the end of an epoch."
            )
        mine = everyone[rank % len(everyone)]
        if mine["rng"] is not None:
            rng.check(mine["rng"])
        try:
            positions = [LoaderState.from_plain(plain) for plain in mine["loaders"]]
        except (KeyError, TypeError):
            rank_zero_warn(
                f"{_NAME}: the checkpoint is of another version of stabletrain: its data position is not read"
            )
            return
        if len(everyone) != size:
            positions = [position._replace(length=None, last=None) for position in positions]
        if "epoch" in mine and self._epoch is not None:  # checkpoints of earlier versions lack it
            self._epoch.load_state_dict(mine["epoch"], same_ranks=len(everyone) == size)
        self._loader.resume_at(positions, mine["rng"] if rank < len(everyone) else None)
        self._loaded = True

    def _current_state(self) -> dict[str, Any]:
        assert self._loader is not None
        assert self._trainer is not None
        if AccumulationWindow(self._trainer).is_open and not self._warned_of_window:
            self._warned_of_window = True
            rank_zero_warn(
                f"{_NAME}: this checkpoint is made between the micro-batches of an optimizer step. Their gradients are "
                "not saved, so the first step after resuming from it will differ. Save after a step."
            )
        state = self._training_rng if self._training_rng is not None else self._loader.run_rng
        here = {"rng": state, "loaders": [position.to_plain() for position in self._loader.positions()]}
        return here if self._epoch is None else {**here, "epoch": self._epoch.state_dict()}

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies do not include the running fit."""
        fit: dict[str, Any] = dict.fromkeys(("_trainer", "_loader", "_epoch", "_training_rng", "_final"))
        fit["_undo"] = []
        return {**self.__dict__, **fit}


def _refuse_own_state(loader: Any) -> None:
    if not isinstance(loader, DataLoader) and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        raise UserError(
            f"{_NAME}: the train loader must be a DataLoader or have no state_dict, got {type(loader).__name__}, which "
            "saves its own position: counting its batches may not lead to the same one. Wrap its dataset in a "
            f"DataLoader, or {_OPT_OUT}: Lightning then restores the loader's own state."
        )
