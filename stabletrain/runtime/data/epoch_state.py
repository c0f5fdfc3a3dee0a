"""What an epoch in progress has gathered, which Lightning does not save, and a resumed fit that goes on with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from stabletrain.runtime.internals import epoch_start
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import restart as restart_internals
from stabletrain.runtime.internals import results as results_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.resuming import BatchCount
from stabletrain.runtime.ranks import Ranks


class EpochMark(NamedTuple):
    """What the epoch had gathered at one moment."""

    shown: dict[str, dict[str, Any]]
    logged: list[results_internals.Logged]
    metrics: dict[str, Any]
    too_large: list[str]


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
        self._module_metrics: dict[str, Any] | None = None
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

    def mark(self) -> EpochMark:
        """What was gathered so far, for `state_dict`, later: at the start of each step, some microseconds."""
        if self._module_metrics is None:
            self._module_metrics = results_internals.metrics_of(self._trainer)
        metrics, too_large = results_internals.copied(self._module_metrics)
        return EpochMark(
            results_internals.shown_now(self._trainer), results_internals.logged_now(self._trainer), metrics, too_large
        )

    def state_dict(self, mark: EpochMark | None = None) -> dict[str, Any]:
        """This rank's state, as tensors on the CPU and plain Python types.

        Args:
            mark: of `mark`, at the moment that the state is to be of; None: now.
        """
        stopped = self._trainer.should_stop and any(map(_has_stopped, self._trainer.callbacks))  # type: ignore[attr-defined]
        if mark is None:
            mark = EpochMark(
                results_internals.shown_now(self._trainer), results_internals.logged_now(self._trainer), {}, []
            )
            within = self._before_validation is not None and not restart_internals.validation_is_complete(self._trainer)
            metrics = self._before_validation if within else self._metrics()
        else:
            metrics = results_internals.on_host(mark.metrics)
            self._warn_of(mark.too_large, results_internals.LARGEST_COPY)
        return {
            "shown": results_internals.shown(mark.shown),
            "logged": results_internals.logged(mark.logged),
            "metrics": metrics,
            "stopped": stopped,
        }

    def load(self, state: dict[str, Any], unfinished: BatchCount | None = None) -> None:
        """Resume with this state: called before training starts.

        Args:
            state: of `checked`.
            unfinished: the batches before the step in which it was saved, and which has to be made; None: it was saved
                between two steps.
        """
        self._loaded = state
        self._restart.activate(unfinished)

    def state_of_all_ranks(self) -> list[dict[str, Any]]:
        """`state_dict` of every rank. A collective."""
        return Ranks(self._trainer).gather(self.state_dict())

    def load_rank(self, everyone: list[dict[str, Any]]) -> None:
        """Resume with this rank's part of `state_of_all_ranks`.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: if it is anything else.
        """
        state = checked(everyone[self._trainer.global_rank % len(everyone)])
        self.load(state if len(everyone) == self._trainer.world_size else without_ranks(state))

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
        if trainer_internals.is_trial(self._trainer):
            return
        self._before_validation = self._metrics()

    def _end_validation(self) -> None:
        self._before_validation = None

    def _metrics(self) -> dict[str, Any]:
        found, too_large = results_internals.metric_states(self._trainer)
        self._warn_of(too_large, results_internals.LARGEST_METRIC)
        return found

    def _warn_of(self, too_large: list[str], limit: int) -> None:
        if too_large and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self._name}: the states of the metrics {', '.join(too_large)} are larger than "
                f"{limit >> 20} MiB and are not saved: after a resume within an epoch, "
                "their values for that epoch cover the batches after the checkpoint only"
            )


def checked(state: dict[str, Any]) -> dict[str, Any]:
    """A state of `EpochState.state_dict`, read from a checkpoint of any content.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: if it is anything else.
    """
    shown = {key: results_internals.checked_shown(state["shown"][key]) for key in results_internals.SHOWN}
    for plain in state["logged"]:
        results_internals.check_logged(plain)
    for plain in state["metrics"].values():
        results_internals.check_metric_state(plain)
    return {**state, "shown": shown, "stopped": bool(state["stopped"])}


def without_ranks(state: dict[str, Any]) -> dict[str, Any]:
    """As far as another number of processes can use it: means and metrics of this epoch start anew."""
    return {**state, "logged": [], "metrics": {}}


def _has_stopped(callback: Any) -> bool:
    """Whether it is an EarlyStopping that has stopped the run.

    What else sets ``should_stop`` may not last: a Timer's run is resumed to get more time.
    """
    reason = getattr(callback, "stopping_reason", None)
    return getattr(reason, "name", "NOT_STOPPED") != "NOT_STOPPED"
