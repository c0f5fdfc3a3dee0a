"""The launcher's part of tracking: create the MLflow run before the worker starts, set its final status at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError
from stabletrain.launch.result import MLFLOW_STATUS, Result
from stabletrain.runtime.records.run_files import UNSENT_METRICS, artifacts

MLFLOW_LOGGER = "stabletrain.tracking.MLflowLogger"


def is_tracked(config: Mapping[str, Any]) -> bool:
    """Return whether a run is logged by `stabletrain.tracking.MLflowLogger`.

    Args:
        config: the resolved config.
    """
    return bool(config.get("logger")) and config["logger"].get("_target_") == MLFLOW_LOGGER


def open_store(config: Mapping[str, Any]) -> str | None:
    """Make the tracking store ready and return its absolute URI; None for a run without MLflow.

    Args:
        config: the resolved config.

    Raises:
        UserError: if the store cannot be used.
    """
    if not is_tracked(config):
        return None
    from stabletrain.tracking.store import absolute_uri, default_tracking_uri, ensure_store

    wanted = config["logger"].get("tracking_uri")
    uri = absolute_uri(wanted) if wanted else default_tracking_uri()
    ensure_store(uri)
    return uri


def open_run(config: dict[str, Any], uri: str, *, parent: str | None = None, name: str | None = None) -> None:
    """Create the run in the store, and write its id and location into the config.

    Args:
        config: the resolved config; its ``logger`` node is completed.
        uri: tracking URI of the store.
        parent: id of the sweep's run; None outside a sweep.
        name: shown in MLflow; None: the folder's name.

    Raises:
        UserError: if the store cannot be used.
    """
    from stabletrain.tracking.runs import start_run

    logger = config["logger"]
    logger["tracking_uri"] = uri
    logger["experiment"] = logger.get("experiment") or config["recipe"]
    logger["save_dir"] = logger.get("save_dir") or config["run_dir"]
    logger["run_id"] = start_run(
        config,
        uri=uri,
        experiment=logger["experiment"],
        parent_run_id=parent,
        run_id=logger.get("run_id"),
        name=name or Path(config["run_dir"]).name,
    )


def open_sweep(uri: str, experiment: str, command: str) -> str:
    """Create the parent run of a sweep's jobs, and return its id.

    Args:
        uri: tracking URI of the store.
        experiment: name of the experiment.
        command: the command line.
    """
    from stabletrain.tracking.runs import create_run

    return create_run(uri, experiment, name="sweep", tags={"stabletrain.command": command, "stabletrain.sweep": "true"})


def finish_sweep(uri: str, run_id: str, results: Sequence[Result]) -> None:
    """Set the final status of a sweep's parent run: the worst of its jobs'.

    Args:
        uri: tracking URI of the store.
        run_id: the parent run.
        results: how the jobs ended.
    """
    from stabletrain.tracking.runs import set_final_status

    statuses = [MLFLOW_STATUS[result.end] for result in results]
    for status in ("KILLED", "FAILED", "FINISHED"):
        if status in statuses or status == "FINISHED":
            set_final_status(uri, run_id, status, force=True)
            return


def finish_run(config: Mapping[str, Any], result: Result) -> str | None:
    """Send the worker's unsent metrics and the run's files to the store, and set the final status.

    Args:
        config: the resolved config.
        result: how the run ended.

    Returns:
        What failed, for the user; None if nothing did.
    """
    if not is_tracked(config) or not config["logger"].get("run_id"):
        return None
    from stabletrain.tracking.runs import set_final_status, upload_files, upload_unsent

    folder = Path(config["run_dir"])
    uri, run_id, unsent = config["logger"]["tracking_uri"], config["logger"]["run_id"], folder / UNSENT_METRICS
    try:
        if unsent.is_file():
            upload_unsent(uri, unsent)
        upload_files(uri, run_id, artifacts(folder))
        set_final_status(uri, run_id, MLFLOW_STATUS[result.end], force=True)
    except Exception as error:  # a store that fails must not change the exit code of a run that has ended
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return f"{text}\n  the run's files are complete, in {config['run_dir']}"
    return None
