"""What is sent to MLflow while a run trains, from threads of the worker: checkpoints, the record of steps, the system.

The training thread waits for none of it, and a store that fails is one warning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.launch.mlflow_run import is_tracked
from stabletrain.runtime.records.run_files import STEPS

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_logger = logging.getLogger("stabletrain")
_LOOK_EVERY = 2.0
"""Seconds between two looks at the folder of checkpoints."""
_REST = 50.0
"""Pause after sending, as a multiple of the time that it took."""


@contextmanager
def sending(config: Mapping[str, Any], trainer: Trainer) -> Iterator[None]:
    """Within it, what a run makes is sent to the store of its final config.

    Args:
        config: the content of run.yaml.
        trainer: of the run.
    """
    running: list[Any] = []
    try:
        if is_tracked(config) and config["logger"].get("run_id"):
            uri, run_id = config["logger"]["tracking_uri"], config["logger"]["run_id"]
            if trainer.is_global_zero:
                running.append(CheckpointUploads(uri, run_id, Path(config["run_dir"])))
            elif config["logger"].get("system_metrics") and trainer.local_rank == 0:  # on rank 0 the logger does it
                from stabletrain.tracking.system_metrics import SystemMetrics, this_node

                running.append(SystemMetrics(uri, run_id, this_node()))
        yield
    finally:
        for each in running:
            each.stop()


class CheckpointUploads:
    """After each checkpoint: sends the record of steps, and lists the checkpoints that are kept as logged models.

    Args:
        uri: MLflow tracking URI.
        run_id: the run.
        folder: of the run.
    """

    def __init__(self, uri: str, run_id: str, folder: Path) -> None:
        self._uri, self._run_id, self._folder = uri, run_id, folder
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stabletrain-checkpoints", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; what was not sent yet is sent by the launcher."""
        self._stopped.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        from stabletrain.tracking.checkpoint_models import checkpoints_in

        sent: set[str] = set()
        said = False
        pause = _LOOK_EVERY
        while not self._stopped.wait(pause):
            pause = _LOOK_EVERY
            started = time.monotonic()
            try:
                names = set(checkpoints_in(self._folder))
                if names != sent:
                    self._send()
                    sent = names
                    pause += _REST * (time.monotonic() - started)
            except Exception as error:
                pause += _REST * (time.monotonic() - started)
                if not said:
                    text = str(error).partition("\n")[0] or type(error).__name__
                    _logger.warning("the checkpoints are not listed in MLflow yet: %s", text)
                said = True

    def _send(self) -> None:
        from stabletrain.tracking.artifacts import upload_files
        from stabletrain.tracking.checkpoint_models import sync_models

        upload_files(self._uri, self._run_id, [self._folder / STEPS])
        sync_models(self._uri, self._run_id, self._folder)
