"""Where an attempt of a run begins: rank 0 says it, and writes it for the launcher when the first batch is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.launch.attempts import forget_records, goes_on_itself, this_attempt
from stabletrain.launch.began import Began, recorded_steps, write_began

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from stabletrain.launch.assemble import Assembled
    from stabletrain.launch.record_resume import RecordResume

_logger = logging.getLogger("stabletrain")


class AttemptStart:
    """Says where an attempt goes on; of the first one, only the launcher learns it.

    Args:
        config: of this attempt.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._folder = Path(config["run_dir"])
        self._attempt = this_attempt()
        self._is_resumed = goes_on_itself(config)
        self._is_exact = bool((config.get("plugins") or {}).get("resume"))
        self._before = 0
        self._resume: RecordResume | None = None
        self._from_step = 0

    def prepare(self, run: Assembled) -> None:
        """Look at what the attempt before has recorded; remove it if this one begins anew. Before the fit.

        Args:
            run: built.
        """
        from stabletrain.launch.record_resume import RecordResume  # imports torch

        found = (each for each in run.trainer.callbacks if isinstance(each, RecordResume))  # type: ignore[attr-defined]
        self._resume = next(found, None)
        if self._attempt > 1 and run.trainer.is_global_zero:
            self._before = recorded_steps(self._folder)
            if not self._is_resumed:
                forget_records(self._folder)

    def begin(self, trainer: Trainer) -> None:
        """Say where it goes on.

        Args:
            trainer: in ``on_train_batch_start`` of the first batch.
        """
        self._from_step = trainer.global_step if self._resume is None else self._resume.attempted
        if self._attempt == 1 or not trainer.is_global_zero:
            return
        text = f"attempt {self._attempt} goes on from step {self._from_step}"
        if not self._is_resumed:
            text = f"attempt {self._attempt} begins at step {self._from_step} again, as there is no checkpoint yet"
        text += f"; steps lost, which are made again: {self._lost}"
        if self._is_resumed and not self._is_exact:
            text += "; without plugins/resume=exactly the data and random numbers are other ones than before"
        _logger.warning("%s", text)

    def first_batch_done(self, trainer: Trainer) -> None:
        """Write it for the launcher.

        Args:
            trainer: in ``on_train_batch_end`` of the first batch.
        """
        if trainer.is_global_zero:
            began = Began(
                attempt=self._attempt, from_step=self._from_step, steps_lost=self._lost, time_ns=time.time_ns()
            )
            write_began(began, self._folder)

    @property
    def _lost(self) -> int:
        return max(0, self._before - self._from_step)
