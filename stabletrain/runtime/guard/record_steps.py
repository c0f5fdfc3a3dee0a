"""`RecordSteps`: the exact record of every attempted step, ``steps.bin``, from the outcomes of the guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.outcome import Outcome
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.records import run_files
from stabletrain.runtime.records.steps_file import flags_of
from stabletrain.runtime.records.steps_record import StepsRecord


class RecordSteps(GuardMember):
    """Write loss, gradient norm and what became of it of every attempted step to a file, ``steps.bin``.

    The metrics in loggers are means over several steps; this is each step, bit for bit. A resumed run overwrites the
    steps that it makes again, and removes those that it has not reached. With several optimizers (manual optimization)
    the steps of all of them are numbered together. Recipes write the file always.
    `stabletrain.runtime.records.steps_file.read_steps` reads it.

    Args:
        path: of the file; None: ``steps.bin`` in the logger's folder.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[RecordSteps("steps.bin")], logger=False, accelerator="cpu")
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._record: StepsRecord | None = None
        self._before = 0
        """Steps before the resume that no guard has counted: of a run without plugins."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Determine the file."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: called on every rank
        writes = trainer.is_global_zero and not trainer_internals.is_fast_dev_run(trainer)
        self._record = StepsRecord(self.path or Path(folder) / run_files.STEPS) if writes else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The number of the first step is known: what an earlier process has recorded from there on is removed."""
        if self._record is not None and self._guard is not None:
            attempted = self._guard.counters.attempted
            self._before = max(0, trainer.global_step - attempted)
            self._record.begin(attempted + self._before)

    def on_attempt(self, outcome: Outcome) -> None:
        """Write a step."""
        if self._record is not None:
            self._record.append(outcome.step + self._before, outcome.loss, outcome.grad_norm, flags_of(outcome))

    def metrics(self) -> dict[str, float]:
        """No metrics; the steps so far are written."""
        if self._record is not None:
            self._record.flush()
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The guard's state if there is no other plugin to keep it; the steps so far are written."""
        state = super().state_dict()  # observes an outcome in flight
        if self._record is not None:
            self._record.flush()
        return state if self._leads else {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        super().teardown(trainer, pl_module, stage)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file: Lightning calls no teardown after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the open file from pickles and copies."""
        return {**super().__getstate__(), "_record": None}

    def _close(self) -> None:
        if self._record is not None:
            self._record.close()
