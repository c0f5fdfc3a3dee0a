"""The hidden state of the module in a checkpoint: tensors in attributes that training has changed."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.hidden.hidden_state import HiddenState
from stabletrain.runtime.hidden.plain import Unsaved, from_plain, to_plain
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import restart as restart_internals

logger = logging.getLogger("stabletrain")


class HiddenTensors:
    """Saves and restores the tensors in attributes of modules, and in buffers that no state_dict holds.

    Args:
        trainer: in ``setup`` of a fit.
        module: that is trained.
        name: of the plugin, to start messages with.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        self._trainer, self._name = trainer, name
        self._hidden = HiddenState(module, False, True)
        self._is_known = False
        self._loaded: dict[str, Any] = {}
        self._warned: set[str] = set()

    def load(self, saved: dict[str, Any]) -> None:
        """Restore this when training starts."""
        self._loaded = dict(saved)

    def on_loop_start(self) -> None:
        """Restore what was loaded; call it after ``on_train_start`` of all callbacks and of the module."""
        self._hidden.stash()
        self._is_known = True
        device = self._trainer.strategy.root_device
        unknown = self._hidden.put({path: from_plain(each, device) for path, each in self._loaded.items()})
        self._loaded = {}
        if unknown:
            rank_zero_warn(
                f"{self._name}: the checkpoint holds hidden state of modules that this run does not have "
                f"({', '.join(unknown[:4])}): it is not restored"
            )

    def state(self) -> dict[str, Any]:
        """What training has changed, by path, as tensors and plain Python types."""
        if not self._is_known:
            return self._loaded
        found, unsaved = {}, []
        for path, value in self._hidden.values(changed=True).items():
            if self._is_of_ended_epoch(value):
                continue
            try:
                found[path] = to_plain(value)
            except Unsaved:
                unsaved.append(path)
        self._say(unsaved)
        return found

    def _say(self, unsaved: list[str]) -> None:
        if new := [path for path in unsaved if path not in self._warned]:
            self._warned.update(new)
            rank_zero_warn(
                f"{self._name}: {', '.join(new)} cannot be saved, so a resumed run starts without: expected tensors, "
                "and tuples, lists and dictionaries of them. Register a buffer, or save it in on_save_checkpoint"
            )
        guarded = any(isinstance(each, GuardMember) for each in self._trainer.callbacks)  # type: ignore[attr-defined]
        if not guarded and self._trainer.is_global_zero:  # else the guard says it
            for message in self._hidden.news():
                logger.warning(message)

    def _is_of_ended_epoch(self, value: Any) -> bool:
        """Whether a list was collected over an epoch, for a hook at its end, which a run that resumes does not call.

        The list would stay in the next epoch.
        """
        goes_on = restart_internals.is_within_epoch(self._trainer)
        if not isinstance(value, list) or goes_on or not loader_internals.epoch_is_over(self._trainer):
            return False
        return len(value) > 2 and 2 * len(value) >= self._trainer.num_training_batches
