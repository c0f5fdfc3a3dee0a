"""The callback: what it adds to a checkpoint, and how a fit goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from stabletrain.errors import UserError, require
from stabletrain.runtime import ranks, rng
from stabletrain.runtime.data.position import LoaderState
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import trainer as trainer_internals

FastForward: TypeAlias = Literal["auto", "indices", "batches"]


class ResumeExactly(Callback):
    """``Trainer.fit(ckpt_path=...)`` goes on at the right batch with the right random numbers.

    Add it to the run that writes checkpoints and to the one that resumes. With the same code, versions, number of
    processes, batch size, threads and hardware the resumed run is bit-identical to one that never stopped. Lightning
    alone begins the epoch's data anew, with other random numbers. Validation no longer moves the random numbers of
    training.

    Args:
        fast_forward: how the epoch's first batches are passed over. ``"auto"``: a map-style dataset read in the
            training process is not asked for them, otherwise they are fetched again, because loader processes that
            draw random numbers must draw them all. ``"indices"``: do not fetch them either where loader processes
            read a map-style dataset; exact if these draw no random numbers. ``"batches"``: always fetch them; for a
            dataset that counts its calls.

    Raises:
        UserError: at the first step of a resumed fit, if the train loader is another one than at the checkpoint.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[ResumeExactly()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self, fast_forward: FastForward = "auto") -> None:
        known = fast_forward in ("auto", "indices", "batches")
        expected = '"auto", "indices" or "batches"'
        require(known, "resume_exactly", "fast_forward", expected, fast_forward, "plugins.resume")
        self.fast_forward: FastForward = fast_forward
        self._trainer: Trainer | None = None
        self._loader: TrainLoader | None = None
        self._undo: list[Callable[[], None]] = []
        self._training_rng: rng.RngState | None = None  # held while validation runs
        self._final: dict[str, Any] | None = None  # of a fit that is over: it may still be saved
        self._loaded = False
        self._warned_of_window = False

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return "resume_exactly"

    # ---- the fit ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand between Lightning and the train loader."""
        if stage != "fit":
            return
        self._close()
        self._trainer, self._final, self._loaded = trainer, None, False
        self._loader = TrainLoader.of(trainer)
        self._loader.keep_position(self.fast_forward)
        self._undo = [
            self._loader.close,
            loader_internals.around_validation(trainer, self._stash_rng, self._restore_rng),
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loop is about to begin: from here on what is drawn is the run's."""
        if self._loader is None:
            return
        for loader in self._loader.loaders:
            _refuse_own_state(loader.loader)
        if self._loaded:
            self._loader.check_positions()
            self._undo.append(loader_internals.trust_loader_at_restart(trainer))
            loader_internals.begin_next_epoch(trainer)
        elif trainer_internals.resumes_from_checkpoint(trainer):
            rank_zero_warn(
                "the checkpoint holds no state of resume_exactly: the epoch's data begin anew, with other random "
                "numbers. Checkpoints written from now on resume exactly."
            )
        self._loader.started = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Random numbers drawn at the start of an epoch are the run's."""
        if self._loader is not None:
            self._loader.epoch_starts()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run may be saved, and gone on with, after its end."""
        self._end_as_the_run_did()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo what was installed."""
        if self._loader is not None and self._loaded and self._final is None:
            self._end_as_the_run_did()  # the run was over at the checkpoint: Lightning does not even begin the loop
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo what was installed; after an exception Lightning calls no teardown, and may yet save."""
        if self._loader is not None and self._final is None:
            self._final = self._here()
        self._close()

    def _end_as_the_run_did(self) -> None:
        self._final = self._here()
        rng.restore(self._final["rng"])  # if no batch was left, nobody has put them back yet

    def _close(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._loader = None

    def _stash_rng(self) -> None:
        assert self._loader is not None
        self._training_rng = self._loader.run_rng

    def _restore_rng(self) -> None:
        if self._training_rng is not None:
            rng.restore(self._training_rng)
            self._training_rng = None

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Positions in the data and random numbers of all ranks. A collective: call it on all of them."""
        here = self._here() if self._loader is not None else self._final
        if here is None:
            return {}
        everyone: list[Any] = [here]
        if ranks.world_size() > 1:
            everyone = [None] * ranks.world_size()
            dist.all_gather_object(everyone, here)
        return {"ranks": everyone}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if self._loader is None or self._trainer is None:
            return
        everyone = state_dict["ranks"]
        rank, size = self._trainer.global_rank, self._trainer.world_size
        if len(everyone) != size:
            rank_zero_warn(
                f"resume_exactly: the checkpoint was made by {len(everyone)} processes and training goes on with "
                f"{size}: each goes on at its own batch of that number, so samples of this epoch may come twice or not "
                "at all, and random numbers differ. Use the same number of processes for an exact resume, or a "
                "checkpoint made at the end of an epoch."
            )
        mine = everyone[rank % len(everyone)]
        positions = [LoaderState.from_plain(plain) for plain in mine["loaders"]]
        if len(everyone) != size:
            positions = [position._replace(length=None, last=None) for position in positions]
        self._loader.resume_at(positions, mine["rng"] if rank < len(everyone) else None)
        self._loaded = True

    def _here(self) -> dict[str, Any]:
        assert self._loader is not None
        assert self._trainer is not None
        if loader_internals.is_within_window(self._trainer) and not self._warned_of_window:
            self._warned_of_window = True
            rank_zero_warn(
                "resume_exactly: this checkpoint is made between the micro-batches of an optimizer step; their "
                "gradients are not saved, so the first step after resuming from it will differ. Save after a step."
            )
        state = self._training_rng if self._training_rng is not None else self._loader.run_rng
        return {"rng": state, "loaders": [position.to_plain() for position in self._loader.positions()]}

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies leave the running fit behind."""
        fit: dict[str, Any] = {"_trainer": None, "_loader": None, "_undo": [], "_training_rng": None, "_final": None}
        return {**self.__dict__, **fit}


def _refuse_own_state(loader: Any) -> None:
    if not isinstance(loader, DataLoader) and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        raise UserError(
            f"resume_exactly: the train loader {type(loader).__name__} keeps its own position (state_dict) and is no "
            "DataLoader, so counting its batches may not lead to the same place. Wrap its dataset in a DataLoader, or "
            "leave ResumeExactly out (config key plugins.resume=none), and Lightning restores the loader's own state."
        )
