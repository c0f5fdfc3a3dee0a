"""Send what a run's folder holds to the tracking store, after a run whose store did not respond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stabletrain.errors import UserError
from stabletrain.launch.mlflow_run import finish_run, is_tracked
from stabletrain.launch.result import read_result
from stabletrain.launch.run_folder import read_run_yaml
from stabletrain.runtime.records.run_files import RESULT, RUN_YAML, UNSENT_METRICS


def upload(folder: Path, uri: str | None = None) -> str:
    """Send a run, or what its store has not accepted of it, and return what was done, as one sentence.

    Args:
        folder: of the run; or the folder of a script that used `stabletrain.tracking.MLflowLogger`.
        uri: tracking URI of the store; None: the default one. What the folder names is not used: it may come from
            anywhere.

    Raises:
        UserError: if there is nothing to send, the run is for another store, or the store cannot be used.
    """
    from stabletrain.tracking.buffer import send_buffer
    from stabletrain.tracking.runs import upload_unsent
    from stabletrain.tracking.store import absolute_uri, default_tracking_uri, ensure_store

    store = absolute_uri(uri) if uri else default_tracking_uri()
    if (folder / RUN_YAML).is_file():
        return _upload_run(folder, store, any_store=uri is not None)
    if not folder.is_dir():
        raise UserError(f"upload: there is no folder {folder}; name the folder of a run")
    ensure_store(store)
    sent, points = send_buffer(folder, store, any_store=uri is not None), 0
    if (folder / UNSENT_METRICS).is_file():
        points = upload_unsent(store, folder / UNSENT_METRICS)
    if not sent and not points:
        raise UserError(f"upload: there is nothing to send in {folder}; name the folder of a run")
    return f"sent to {store}: {len(sent)} runs, {points} further metrics"


def _upload_run(folder: Path, store: str, *, any_store: bool) -> str:
    from stabletrain.tracking.buffer import SEND_TO, buffer_uri
    from stabletrain.tracking.store import open_client
    from stabletrain.tracking.store_errors import sqlite_path

    config: dict[str, Any] = read_run_yaml(folder / RUN_YAML)
    result = read_result(folder)
    if not is_tracked(config) or not config["logger"].get("run_id"):
        raise UserError(
            f"upload: the run in {folder} was not recorded in MLflow (logger=none); there is nothing to send"
        )
    if result is None:
        raise UserError(f"upload: the run in {folder} has no {RESULT}: it has not ended; wait, or resume it")
    logger = config["logger"]
    recorded, buffer = logger["tracking_uri"], buffer_uri(Path(config["run_dir"]))
    path = sqlite_path(buffer)
    if recorded == buffer:
        if path is None or not path.is_file():
            raise UserError(f"upload: the run in {folder} was sent before, or its buffer was deleted")
        recorded = open_client(buffer).get_run(logger["run_id"]).data.tags.get(SEND_TO, store)
    if recorded != store and not any_store:
        raise UserError(f"upload: the run in {folder} is of the store {recorded}, not of {store}; add --uri {recorded}")
    if logger["tracking_uri"] != buffer:
        logger["tracking_uri"] = store
    warning = finish_run(config, result, store=store)
    if warning:
        raise UserError(warning.splitlines()[0])
    return f"sent to {store}: run {logger['run_id']}"
