"""At which step a run was resumed, ``resumes.json``; and the events before it, so that events.jsonl is whole, too.

A further attempt of the same run is no such resume: its records are those of the run, and what it makes again is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stabletrain.launch.attempts import goes_on_itself
from stabletrain.launch.bounded import write_json
from stabletrain.launch.earlier_steps import (
    cut_events,
    read_resumes,
    resumed_folder,
    take_over_events,
    take_over_steps,
)
from stabletrain.runtime.records.run_files import EVENTS, RESUMED
from stabletrain.runtime.records.steps_record import attempted_in


class RecordResume(Callback):
    """Append the attempted steps that the checkpoint holds to ``resumes.json``, with those of earlier resumes.

    `stabletrain.launch.reproduce` needs them: a resumed run's ``steps.bin`` holds the steps before the resume, too.

    Args:
        config: the content of run.yaml, with a checkpoint to resume from.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.attempted = 0
        """Attempted steps that the checkpoint holds, once it is loaded."""
        self._file = Path(config["run_dir"]) / RESUMED
        self._earlier = resumed_folder(config)
        self._is_further_attempt = goes_on_itself(config)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how many steps a run with plugins had attempted, if this one has none."""
        self.attempted = attempted_in(checkpoint)
        if self._is_further_attempt and trainer.is_global_zero:  # before anything is written at the step of the resume
            step = checkpoint.get("global_step")
            with suppress(OSError):
                cut_events(self._file.parent / EVENTS, max(step if isinstance(step, int) else 0, self.attempted))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint is loaded: take over what was recorded up to it, and write the file."""
        attempted = self.attempted = max(trainer.global_step, self.attempted)
        if trainer.is_global_zero and not self._is_further_attempt:
            earlier = [] if self._earlier is None else read_resumes(self._earlier / RESUMED)
            take_over_steps(self._config, attempted)
            with suppress(OSError):  # a disk that is full does not end the training
                write_json(self._file, [*earlier, attempted])
                if self._earlier is not None and self._earlier.resolve() != self._file.parent.resolve():
                    take_over_events(self._earlier / EVENTS, self._file.parent / EVENTS, attempted)
