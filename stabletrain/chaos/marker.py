"""A small file with the last step at which a fault happened, so that a resumed run does not repeat it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lightning.pytorch import Trainer

from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.records.run_files import CHAOS


class Marker:
    """The marker file of one fault on one rank, in the run's folder.

    Args:
        trainer: in ``on_fit_start``, on all ranks.
        name: of the fault, unique in the run.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        file = f"{CHAOS}/{name}-rank{trainer.global_rank}.json"
        self.path = Path(trainer.log_dir or trainer.default_root_dir) / file
        self._sources = [self.path]
        if trainer.ckpt_path:  # a resumed run has another folder; its marker is in the folder of the checkpoint
            self._sources += [parent / file for parent in Path(trainer.ckpt_path).absolute().parents[:3]]

    def read(self) -> int | None:
        """Return the last step at which the fault happened; None if it has not."""
        found = [int(json.loads(path.read_text("utf-8"))["step"]) for path in self._sources if path.is_file()]
        return max(found, default=None)

    def write(self, step: int) -> None:
        """Write a step, and wait until it is on disk, since the process may be about to die."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self.path.with_suffix(f".{os.getpid()}")
            with open(scratch, "w", encoding="utf-8") as file:
                json.dump({"step": step}, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self.path)
        except OSError as error:
            logger.warning("chaos: cannot write %s (%s); a resumed run would repeat the fault", self.path, error)

    def remove(self) -> None:
        """Delete the marker of an earlier run in the same folder."""
        self.path.unlink(missing_ok=True)
