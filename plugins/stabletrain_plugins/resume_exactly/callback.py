"""The callback `ResumeExactly`: what it saves in a checkpoint, and how a fit resumes from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from stabletrain.errors import UserError, require
from stabletrain.runtime import rng
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.data.position import LoaderState
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.hidden.hidden_state import HiddenState
from stabletrain.runtime.hidden.plain import Unsaved, from_plain, to_plain
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.fabric import refuse_in_fabric
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.plugin_state import names_its_plugin
from stabletrain_plugins.resume_exactly.trained import Trained, check

FastForward: TypeAlias = Literal["auto", "indices", "batches"]

logger = logging.getLogger("stabletrain")

_NAME = "resume_exactly"
_OPT_OUT = "remove ResumeExactly (config key plugins.resume=none)"


@refuse_in_fabric
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
        require(known, _NAME, "fast_forward", expected, fast_forward, "plugins.resume", "ResumeExactly")
        self.fast_forward: FastForward = fast_forward
        self._trainer: Trainer | None = None
        self._loader: TrainLoader | None = None
        self._undo: list[Callable[[], None]] = []
        self._training_rng: rng.RngState | None = None  # state of the training's generators while validation runs
        self._final: dict[str, Any] | None = None  # the state of a fit that has ended, which may still be saved
        self._loaded = False
        self._warned_of_window = False
        self._warned_of_hidden: set[str] = set()
        self._hidden_is_known = False
        self._saved_hidden: dict[str, Any] = {}
        self._trained: Trained | None = None
        self._saved_trained: dict[str, Any] | None = None

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
        if trainer.precision_plugin.precision == "64-true":
            # Lightning does this after it has loaded a checkpoint, whose numbers are rounded to float32 by then
            trainer.precision_plugin.convert_module(pl_module)
        self._trainer, self._final, self._loaded = trainer, None, False
        self._hidden, self._saved_hidden = HiddenState(trainer_internals.unwrapped(pl_module), False, True), {}
        self._hidden_is_known = False
        self._trained, self._saved_trained = None, None
        self._loader = TrainLoader.of(trainer)
        self._loader.record_positions(self.fast_forward, _NAME, _OPT_OUT)
        self._undo = [
            self._loader.close,
            loader_internals.after_train_start(trainer, self._on_loop_start),
            loader_internals.around_validation(trainer, self._stash_rng, self._restore_rng),
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the optimizers' states are loaded: give them the parameters that they had at the checkpoint."""
        if self._loader is not None:
            self._trained = Trained(trainer_internals.unwrapped(pl_module), trainer.optimizers)
            if self._saved_trained is not None:
                self._trained.restore_groups(self._saved_trained)

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

    def _on_loop_start(self) -> None:
        """After ``on_train_start`` of all callbacks and of the module."""
        assert self._loader is not None
        assert self._trainer is not None
        self._loader.on_loop_start()
        if self._trained is not None and self._saved_trained is not None:
            self._trained.restore_flags(self._saved_trained)
        self._hidden.stash()
        self._hidden_is_known = True
        device = self._trainer.strategy.root_device
        unknown = self._hidden.put({path: from_plain(each, device) for path, each in self._saved_hidden.items()})
        self._saved_hidden = {}
        if unknown:
            rank_zero_warn(
                f"{_NAME}: the checkpoint holds hidden state of modules that this run does not have "
                f"({', '.join(unknown[:4])}): it is not restored"
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
        if "trained" in mine:
            self._saved_trained = check(mine["trained"])
        if len(everyone) == size:
            self._saved_hidden = dict(mine.get("hidden", {}))
            for each in self._saved_hidden.values():
                from_plain(each, torch.device("cpu"))  # raises an error now if it is something else
        try:
            positions = [LoaderState.from_plain(plain) for plain in mine["loaders"]]
        except (KeyError, TypeError):
            rank_zero_warn(
                f"{_NAME}: the checkpoint is of another version of stabletrain: its data position is not read"
            )
            return
        if len(everyone) != size:
            positions = [position._replace(length=None, last=None) for position in positions]
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
        positions = [position.to_plain() for position in self._loader.positions()]
        own: dict[str, Any] = {"rng": state, "loaders": positions, "hidden": self._hidden_state()}
        return own if self._trained is None else {**own, "trained": self._trained.state()}

    def _hidden_state(self) -> dict[str, Any]:
        """The tensors in attributes of modules, and in buffers that no state_dict holds, that training has changed."""
        if not self._hidden_is_known:
            return self._saved_hidden
        found, unsaved = {}, []
        assert self._trainer is not None
        for path, value in self._hidden.values(changed=True).items():
            if self._is_of_ended_epoch(value):
                continue
            try:
                found[path] = to_plain(value)
            except Unsaved:
                unsaved.append(path)
        if new := [path for path in unsaved if path not in self._warned_of_hidden]:
            self._warned_of_hidden.update(new)
            rank_zero_warn(
                f"{_NAME}: {', '.join(new)} cannot be saved, so a resumed run starts without: expected tensors, and "
                "tuples, lists and dictionaries of them. Register a buffer, or save it in on_save_checkpoint"
            )
        guarded = any(isinstance(each, GuardMember) for each in self._trainer.callbacks)  # type: ignore[attr-defined]
        if not guarded and self._trainer.is_global_zero:  # else the guard says it
            for message in self._hidden.news():
                logger.warning(message)
        return found

    def _is_of_ended_epoch(self, value: Any) -> bool:
        """Whether a list was collected over an epoch whose last batch is done, for a hook at the epoch's end.

        Lightning does not call that hook in a fit that resumes here, so the list would stay in the next epoch.
        """
        assert self._trainer is not None
        if not isinstance(value, list) or not loader_internals.epoch_is_over(self._trainer):
            return False
        return len(value) > 2 and 2 * len(value) >= self._trainer.num_training_batches

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies do not include the running fit."""
        fit: dict[str, Any] = {"_trainer": None, "_loader": None, "_undo": [], "_training_rng": None, "_final": None}
        fit |= {"_trained": None, "_saved_trained": None, "_hidden_is_known": False, "_saved_hidden": {}}
        return {key: value for key, value in {**self.__dict__, **fit}.items() if key != "_hidden"}


def _refuse_own_state(loader: Any) -> None:
    if not isinstance(loader, DataLoader) and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        raise UserError(
            f"{_NAME}: the train loader must be a DataLoader or have no state_dict, got {type(loader).__name__}, which "
            "saves its own position: counting its batches may not lead to the same one. Wrap its dataset in a "
            f"DataLoader, or {_OPT_OUT}: Lightning then restores the loader's own state."
        )
