"""The MLflow run around the training, which is not ours: of ``mlflow.start_run()``, autologging, or ``mlflow run``."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

from stabletrain.tracking.store import absolute_uri, default_tracking_uri


class EnclosingRun(NamedTuple):
    """A run that somebody else has started and will end.

    Args:
        run_id: its id.
        tracking_uri: its store, absolute.
    """

    run_id: str
    tracking_uri: str


def enclosing_run(tracking_uri: str | None) -> EnclosingRun | None:
    """Return the run into which ``mlflow.log_metric`` would log here; None if there is none, or it is in another store.

    Args:
        tracking_uri: the store that was asked for; None: that of the run.
    """
    mlflow = sys.modules.get("mlflow")
    active = None if mlflow is None else mlflow.active_run()
    if mlflow is not None and active is not None:
        found = EnclosingRun(str(active.info.run_id), absolute_uri(mlflow.get_tracking_uri()))
    elif run_id := os.environ.get("MLFLOW_RUN_ID"):  # of a process that MLflow has started, `mlflow run`
        found = EnclosingRun(run_id, default_tracking_uri())
    else:
        return None
    return found if tracking_uri is None or absolute_uri(tracking_uri) == found.tracking_uri else None


def is_autologged(run: Any) -> bool:
    """Return whether autologging has started a run, for one fit, and not the user.

    Args:
        run: an ``mlflow.entities.Run``.
    """
    return "mlflow.autologging" in run.data.tags


def end_autologged(run_id: str, status: str) -> None:
    """End a run of autologging whose fit a signal or ``sys.exit`` has ended; autologging ends it in all other cases.

    Autologging does so after an exception and after Ctrl-C. But Lightning turns Ctrl-C and SIGTERM into `SystemExit`,
    at which the run would stay open, and be FINISHED at the end of the process.

    Args:
        run_id: the run; nothing is done if it is not active any more.
        status: nothing is done if it is ``FINISHED``.
    """
    mlflow = sys.modules.get("mlflow")
    active = None if mlflow is None else mlflow.active_run()
    if mlflow is not None and active is not None and active.info.run_id == run_id and status != "FINISHED":
        mlflow.end_run(status)
