"""The launcher's part of tracking: opening a run before its worker starts, and settling it whatever happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError
from stabletrain.launch.result import MLFLOW, Result

MLFLOW_LOGGER = "stabletrain.tracking.MLflowLogger"
UNSENT = "metrics-unsent.jsonl"
KEPT = ("events.jsonl", "interventions.jsonl", "result.json", "sample.txt")
"""What a run leaves in its folder that belongs to its record; diagnoses too."""


def is_tracked(config: Mapping[str, Any]) -> bool:
    """Return whether a run is kept by our MLflow logger.

    Args:
        config: a resolved run.
    """
    return bool(config.get("logger")) and config["logger"].get("_target_") == MLFLOW_LOGGER


def open_store(config: Mapping[str, Any]) -> str | None:
    """Make the store of a run ready and return its absolute URI; None for a run without MLflow.

    Args:
        config: a resolved run.

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
    """Open the run in the store and write where it is into its config.

    Args:
        config: a resolved run; its ``logger`` node is completed.
        uri: the store.
        parent: the sweep's run.
        name: shown in MLflow; the folder's name if None.

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
    """Open the run under which the jobs of a sweep are shown, and return its id.

    Args:
        uri: the store.
        experiment: name of the experiment.
        command: what was typed.
    """
    from stabletrain.tracking.runs import create_run

    return create_run(uri, experiment, name="sweep", tags={"stabletrain.command": command, "stabletrain.sweep": "true"})


def settle_sweep(uri: str, run_id: str, results: Sequence[Result]) -> None:
    """Give a sweep's own run its final status: the worst of its jobs'.

    Args:
        uri: the store.
        run_id: the sweep's run.
        results: how its jobs ended.
    """
    from stabletrain.tracking.runs import settle

    statuses = [MLFLOW[result.end] for result in results]
    for status in ("KILLED", "FAILED", "FINISHED"):
        if status in statuses or status == "FINISHED":
            settle(uri, run_id, status, force=True)
            return


def settle_run(config: Mapping[str, Any], result: Result) -> str | None:
    """Give a run its final status, and send what its worker could not; return a complaint if that fails.

    Args:
        config: a resolved run.
        result: how it ended.
    """
    if not is_tracked(config) or not config["logger"].get("run_id"):
        return None
    from stabletrain.tracking.runs import keep_files, settle, upload_unsent

    folder = Path(config["run_dir"])
    uri, unsent = config["logger"]["tracking_uri"], folder / UNSENT
    try:
        if unsent.is_file():
            upload_unsent(uri, unsent)
        kept = [folder / name for name in KEPT]
        keep_files(uri, config["logger"]["run_id"], [*kept, *sorted(folder.glob("diagnosis-*"))])
        settle(uri, config["logger"]["run_id"], MLFLOW[result.end], force=True)
    except Exception as error:  # whatever the store does, the run that has ended is told and its exit code kept
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return f"{text}\n  the run itself is whole, in {config['run_dir']}"
    return None
