"""Runs whose tracking server does not respond when they begin: recorded in a local database, and sent later.

The buffer is a folder with a database of MLflow's and artifacts. All that a run logs goes there as to any other store.
Sending copies it, also into a run that exists already; a run that was sent before, and perhaps only in part, is not
sent a second time as another run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stabletrain.errors import UserError
from stabletrain.runtime.records.run_files import UNSENT_RUNS
from stabletrain.tracking.artifacts import require_safe_location, upload_files
from stabletrain.tracking.naming import chunks
from stabletrain.tracking.ownership import OWNER, WORKER
from stabletrain.tracking.runs import create_run, settle_abandoned, write_params, write_tags
from stabletrain.tracking.store import ensure_store, open_client
from stabletrain.tracking.store_errors import StoreError, translate_errors
from stabletrain.tracking.writer import BATCH

SEND_TO = "stabletrain.buffer.send_to"
"""Tag of a run in the buffer: the store that it is for."""
CONTINUES = "stabletrain.buffer.continues"
"""Tag of a run in the buffer: the run of that store to which it belongs; without this tag it becomes a new one."""
_SENT_FROM = "stabletrain.buffer.id"
"""Tag of a run that was sent: its id in the buffer."""
_OF_THE_BUFFER = (SEND_TO, CONTINUES, OWNER, WORKER)


class SentRun(NamedTuple):
    """A run of a buffer that was sent.

    Args:
        buffered: its id in the buffer.
        run_id: its id in the store.
        uri: of the store.
    """

    buffered: str
    run_id: str
    uri: str


def buffer_uri(folder: Path) -> str:
    """Return the tracking URI of the buffer in a run's folder.

    Args:
        folder: of the run.
    """
    return f"sqlite:///{folder.absolute() / UNSENT_RUNS / 'mlflow.db'}"


def open_buffer(folder: Path) -> str:
    """Make the buffer in a run's folder ready, and return its tracking URI.

    Args:
        folder: of the run.

    Raises:
        StoreError: if it cannot be written.
    """
    uri = buffer_uri(folder)
    ensure_store(uri)
    return uri


def send_buffer(folder: Path, uri: str, run_id: str | None = None, *, any_store: bool = False) -> list[SentRun]:
    """Send the runs of a buffer to their store; the buffer is deleted when nothing is left in it.

    Args:
        folder: that contains the buffer.
        uri: tracking URI of the store.
        run_id: send this run of the buffer only; None: all that have ended.
        any_store: whether runs that were recorded for another store are sent, too.

    Returns:
        The runs that were sent.

    Raises:
        StoreError: if the store or the buffer cannot be used; what was not sent stays.
        UserError: if a run is for another store.
    """
    place = folder.absolute() / UNSENT_RUNS
    if not (place / "mlflow.db").is_file():
        return []
    source_uri = open_buffer(folder)
    settle_abandoned(source_uri)  # of a process that was killed
    with translate_errors(source_uri):
        source = open_client(source_uri)
        experiments = {each.experiment_id: each.name for each in source.search_experiments()}
        runs = list(source.search_runs(list(experiments)))
    chosen = [run for run in runs if run.info.run_id == run_id or (run_id is None and run.info.status != "RUNNING")]
    for run in chosen:
        wanted = run.data.tags.get(SEND_TO, uri)
        if wanted != uri and not any_store:
            raise UserError(f"the run in {place} is for the store {wanted}, not for {uri}; add --uri {wanted}")
    sent = []
    for run in chosen:
        with translate_errors(uri):
            found = _send(source, run, experiments[run.info.experiment_id], uri)
        sent.append(SentRun(run.info.run_id, found, uri))
        source.delete_run(run.info.run_id)
    if len(chosen) == len(runs):
        shutil.rmtree(place, ignore_errors=True)
    return sent


def _send(source: Any, run: Any, experiment: str, uri: str) -> str:
    """Copy one run, and return its id in the store."""
    ensure_store(uri)
    target = open_client(uri)
    tags = {key: value for key, value in run.data.tags.items() if key not in _OF_THE_BUFFER}
    new = run.data.tags.get(CONTINUES) or _sent_before(target, experiment, run.info.run_id)
    if new is None:
        known = {**tags, _SENT_FROM: run.info.run_id}
        new = create_run(uri, experiment, name=run.info.run_name, tags=known, start_time=run.info.start_time)
    else:
        write_tags(target, new, {key: value for key, value in tags.items() if not key.startswith("mlflow.")})
    write_params(target, new, run.data.params)
    for key in run.data.metrics:
        for part in chunks(source.get_metric_history(run.info.run_id, key), BATCH):
            target.log_batch(new, metrics=part)
    if run.inputs is not None and run.inputs.dataset_inputs:
        target.log_inputs(new, run.inputs.dataset_inputs)
    upload_files(uri, new, sorted(_artifacts(source.tracking_uri, run.info.artifact_uri).glob("*")))
    if run.info.status != "RUNNING":
        target.set_terminated(new, run.info.status, end_time=run.info.end_time)
    return str(new)


def _sent_before(target: Any, experiment: str, run_id: str) -> str | None:
    """The run that an attempt to send has made before it was interrupted; None if there is none."""
    found = target.get_experiment_by_name(experiment)
    if found is None:
        return None
    runs = target.search_runs([found.experiment_id], f"tags.`{_SENT_FROM}` = '{run_id}'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _artifacts(uri: str, location: str) -> Path:
    """The folder of a run's artifacts: a buffer that comes from elsewhere does not say which files are read."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    if not is_local_uri(location):
        raise StoreError(f"tracking store: the buffer {uri} names {location!r} as the folder of its artifacts")
    require_safe_location(uri, location)
    return Path(local_file_uri_to_path(location))


def tags_for(uri: str, run_id: str | None) -> Mapping[str, str]:
    """Return the tags that say where a run in the buffer belongs.

    Args:
        uri: tracking URI of its store.
        run_id: the run of that store to which it belongs; None: it becomes a new one.
    """
    return {SEND_TO: uri} | ({CONTINUES: run_id} if run_id is not None else {})
