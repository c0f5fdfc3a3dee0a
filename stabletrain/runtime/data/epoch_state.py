"""What an epoch in progress has gathered, which Lightning does not save, and a resumed fit that goes on with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from stabletrain.runtime.internals import epoch_start
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import restart as restart_internals
from stabletrain.runtime.internals import results as results_internals
from stabletrain.runtime.ranks import Ranks


class EpochState:
    """Epoch means, metrics, the latest logged values, and whether EarlyStopping has stopped the run.

    A fit that resumes with its state continues where the checkpoint was saved: see `internals.restart.Restart`.

    Args:
        trainer: in ``setup`` of a fit.
        name: of the plugin, to start messages with.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        self._trainer, self._name = trainer, name
        self._loaded: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._warned = False
        self._restart = restart_internals.Restart(trainer, self._restore, self._was_stopped)
        self._undo: list[Callable[[], None]] = [
            self._restart.remove,
            loader_internals.around_validation(trainer, self._start_validation, self._end_validation),
        ]

    @staticmethod
    def is_kept(trainer: Trainer) -> bool:
        """Whether a plugin of this trainer keeps it already."""
        return restart_internals.Restart.of(trainer) is not None

    @property
    def is_loaded(self) -> bool:
        """Whether the fit resumes with a state of it."""
        return self._loaded is not None

    def close(self) -> None:
        """Restore Lightning's methods."""
        while self._undo:
            self._undo.pop()()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, as tensors on the CPU and plain Python types."""
        within = self._before_validation is not None and not restart_internals.validation_is_complete(self._trainer)
        return {
            "shown": results_internals.shown(self._trainer),
            "logged": results_internals.logged(self._trainer),
            "metrics": self._before_validation if within else self._metrics(),
            "stopped": self._trainer.should_stop and any(map(_has_stopped, self._trainer.callbacks)),  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: dict[str, Any], same_ranks: bool = True) -> None:
        """Resume with this state: called before training starts.

        Args:
            state: of `state_dict`.
            same_ranks: False if the number of processes has changed: means and metrics of this epoch then start anew.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: if it is anything else.
        """
        shown = {key: dict(state["shown"][key]) for key in results_internals.shown(self._trainer)}
        for plain in state["logged"]:
            results_internals.check_logged(plain)
        for plain in state["metrics"].values():
            results_internals.check_metric_state(plain)
        rest = {"logged": state["logged"], "metrics": state["metrics"]} if same_ranks else {"logged": [], "metrics": {}}
        self._loaded = {"shown": shown, **rest, "stopped": bool(state["stopped"])}
        self._restart.active = True

    def state_of_all_ranks(self) -> list[dict[str, Any]]:
        """`state_dict` of every rank. A collective."""
        return Ranks(self._trainer).gather(self.state_dict())

    def load_rank(self, everyone: list[dict[str, Any]]) -> None:
        """`load_state_dict` with this rank's part of `state_of_all_ranks`."""
        rank = self._trainer.global_rank % len(everyone)
        self.load_state_dict(everyone[rank], len(everyone) == self._trainer.world_size)

    # ---- called by the loops ----------------------------------------------------------------------------------------

    def _restore(self, within_epoch: bool) -> None:
        assert self._loaded is not None
        trainer = self._trainer
        results_internals.set_metric_states(trainer, self._loaded["metrics"])
        results_internals.set_logged(trainer, self._loaded["logged"])
        results_internals.set_shown(trainer, self._loaded["shown"])
        epoch_start.restore_weight_averaging(trainer)
        epoch_start.show_progress(trainer, within_epoch)

    def _was_stopped(self) -> bool:
        return self._loaded is not None and bool(self._loaded["stopped"])

    def _start_validation(self) -> None:
        self._before_validation = self._metrics()

    def _end_validation(self) -> None:
        self._before_validation = None

    def _metrics(self) -> dict[str, Any]:
        found, too_large = results_internals.metric_states(self._trainer)
        if too_large and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self._name}: the states of the metrics {', '.join(too_large)} are larger than "
                f"{results_internals.LARGEST_METRIC >> 20} MiB and are not saved: after a resume within an epoch, "
                "their values for that epoch cover the batches after the checkpoint only"
            )
        return found


def _has_stopped(callback: Any) -> bool:
    """Whether it is an EarlyStopping that has stopped the run.

    What else sets ``should_stop`` may not last: a Timer's run is resumed to get more time.
    """
    reason = getattr(callback, "stopping_reason", None)
    return getattr(reason, "name", "NOT_STOPPED") != "NOT_STOPPED"
