"""Where the train loaders start after a checkpoint was loaded, and with which random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.runtime.data.position import LoaderState, in_this_world, restore_own, size_mismatch
from stabletrain.runtime.internals import loader as loader_internals


class ResumePoint:
    """The positions and random generators of a loaded checkpoint, which the loaders and the run start from, once.

    Lightning creates iterators, prefetches and calls hooks before the training loop starts. The random numbers drawn
    there are not part of the run: the generators are restored when the loop starts.

    Args:
        trainer: whose train loaders they are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.enabled = False  # a checkpoint may be saved with positions at any time
        self._fast_forward = "auto"
        self._name = "train loader"
        self._opt_out = "start a new run"
        self._positions: list[LoaderState] | None = None  # until training has fetched a batch
        self._pending: list[LoaderState | None] = []  # by loader; None once taken
        self._rng: rng.RngState | None = None  # the run's generators until the loop starts
        self._loop_started = False

    # ---- called for the checkpoint ----------------------------------------------------------------------------------

    def enable(self, fast_forward: str, name: str, opt_out: str) -> None:
        """See `TrainLoader.record_positions`."""
        self.enabled = True
        self._fast_forward, self._name, self._opt_out = fast_forward, name, opt_out

    def set(self, positions: Sequence[LoaderState], state: rng.RngState | None) -> None:
        """See `TrainLoader.resume_at`."""
        self._positions, self._pending = (
            list(positions) or None,
            list(positions),
        )  # none: saved before the loaders existed
        self._rng, self._loop_started = state, False

    @property
    def positions(self) -> list[LoaderState] | None:
        """The positions until training has fetched a batch, then None."""
        return self._positions

    @property
    def run_rng(self) -> rng.RngState | None:
        """The run's generators until the training loop starts, then None."""
        return self._rng

    def check(self) -> None:
        """See `TrainLoader.check_positions`."""
        if self._positions is None:
            return
        positions, loaders = self._positions, loader_internals.train_loaders(self._trainer)
        if len(positions) != len(loaders):
            raise UserError(
                f"{self._name}: the checkpoint was saved with {len(positions)} train loaders, got {len(loaders)}. "
                f"Use the same train_dataloader, or {self._opt_out}."
            )
        shared = loader_internals.all_ranks_read_alike(self._trainer)
        for i, loader in enumerate(loaders):
            position = positions[i] = in_this_world(positions[i], loader.loader, shared)
            if self._pending[i] is not None:
                self._pending[i] = position
            problem = size_mismatch(position, loader)
            if problem and position.batches:
                raise self.mismatch(
                    f"the checkpoint was saved after batch {position.batches} of an epoch, and {problem}"
                )
            if problem:
                self.warn(
                    f"{problem}; the checkpoint was saved between two epochs, so training continues with the present "
                    "data"
                )

    @property
    def has_started(self) -> bool:
        """Whether the training loop has started."""
        return self._loop_started

    # ---- called when the training loop starts -----------------------------------------------------------------------

    def on_loop_start(self) -> None:
        """Restore the run's generators; the positions are dropped at the next fetch."""
        self._loop_started = True
        if self._rng is not None:
            rng.restore(self._rng)
            self._rng = None
        loaders = loader_internals.train_loaders(self._trainer)
        for index, position in enumerate(self._positions or []):
            restore_own(position.generators or [], loaders[index])  # those of a validation loader may be the same
            if position.start.rng is None:  # Lightning calls iter() again for the new epoch, after the epoch's hooks
                self._pending[index] = position

    # ---- called by the loaders --------------------------------------------------------------------------------------

    def take(self, loader: Any) -> LoaderState | None:
        """Return the position at which a new iterator of this loader starts, once; else None.

        Raises:
            UserError: as `check`.
        """
        if not self._pending:
            return None
        self.check()
        index = loader_internals.train_loaders(self._trainer).index(loader)
        position, self._pending[index] = self._pending[index], None
        return position

    def after_fetch(self) -> None:
        """Called after a loader has fetched a batch: drop the positions, if the training loop has started."""
        if self._loop_started:
            self._positions = None

    def skips_fetching(self, in_process: bool) -> bool:
        """Whether a map-style loader skips the batches before its position without fetching them.

        Args:
            in_process: whether batches are fetched in this process, and not by workers.
        """
        return self._fast_forward == "indices" or (self._fast_forward == "auto" and in_process)

    # ---- messages ---------------------------------------------------------------------------------------------------

    def mismatch(self, problem: str) -> UserError:
        """The error for a loader whose data differ from those of the checkpoint."""
        return UserError(
            f"{self._name}: {problem}. Restore the data, or resume with other data from a checkpoint saved at the "
            f"end of an epoch, or {self._opt_out}: the epoch's data then restart at the first batch."
        )

    def warn_of_other_samples(self, reason: str) -> None:
        """Warn that the rest of an epoch has other samples than it would have had on the ranks that began it."""
        self.warn(
            "each process resumes at the same batch number of its own data, so samples of this epoch may be used twice "
            f"or not at all: {reason}. A checkpoint saved at the end of an epoch has no such rest"
        )

    def warn(self, message: str) -> None:
        """Warn on rank 0, in the name of the plugin that resumes."""
        rank_zero_warn(f"{self._name}: {message}")
