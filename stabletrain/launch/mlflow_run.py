"""The launcher's part of tracking: create the MLflow run before the worker starts, set its final status at the end."""

from __future__ import annotations

import importlib
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stabletrain.errors import UserError
from stabletrain.launch.imports import importing
from stabletrain.launch.result import MLFLOW_STATUS, Result, read_result
from stabletrain.launch.run_end import describe_end, forget_end
from stabletrain.launch.run_folder import write_run_yaml
from stabletrain.runtime.records.run_files import RESULT, UNSENT_METRICS, artifacts

_logger = logging.getLogger("stabletrain")

ATTEMPTS_TAG = "stabletrain.attempts"
"""The number of attempts of a run, if there are several."""

MLFLOW_LOGGER = "stabletrain.tracking.MLflowLogger"


def is_tracked(config: Mapping[str, Any]) -> bool:
    """Return whether a run is logged by `stabletrain.tracking.MLflowLogger`.

    Args:
        config: the resolved config.
    """
    logger = config.get("logger")
    return isinstance(logger, Mapping) and logger.get("_target_") == MLFLOW_LOGGER


def open_store(config: Mapping[str, Any]) -> str | None:
    """Make the tracking store ready and return its absolute URI; None for a run without MLflow.

    Runs in it that a killed process of this machine left RUNNING get a final status.

    Args:
        config: the resolved config.

    Raises:
        UserError: if the store cannot be used.
    """
    uri = import_store_of(config)
    if uri is None:
        return None
    from stabletrain.tracking.runs import settle_abandoned
    from stabletrain.tracking.store import ensure_store

    ensure_store(uri)
    settle_abandoned(uri, _status_in)
    return uri


def import_store_of(config: Mapping[str, Any]) -> str | None:
    """Import MLflow and what the tracking store of a run needs; return the store's absolute URI.

    Args:
        config: the resolved config.

    Returns:
        None for a run without MLflow.

    Raises:
        UserError: if MLflow is not installed, or the config does not name a store.
    """
    if not is_tracked(config):
        return None
    from stabletrain.tracking.store import absolute_uri, default_tracking_uri, import_store

    wanted = config["logger"].get("tracking_uri")
    if not isinstance(wanted, str | None):
        raise UserError(f"logger.tracking_uri: expected text or null, got {wanted!r:.200}")
    uri = absolute_uri(wanted) if wanted else default_tracking_uri()
    with importing("mlflow"):
        import_store(uri)
    return uri


def open_run(
    config: dict[str, Any],
    uri: str,
    *,
    parent: str | None = None,
    name: str | None = None,
    command: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
    git: Mapping[str, Any] | None = None,
) -> None:
    """Create the run in the store, and write its id and location into the config.

    If the store is a server that does not respond, the run is created in a buffer in its folder, and sent later.

    Args:
        config: the resolved config; its ``logger`` node is completed.
        uri: tracking URI of the store.
        parent: id of the sweep's run; None outside a sweep.
        name: shown in MLflow; None: the folder's name.
        command: the command line.
        tags: further tags.
        git: from `stabletrain.launch.recording.git_of_run`; None: it is read here.

    Raises:
        UserError: if the store cannot be used.
    """
    from stabletrain.tracking.buffer import open_buffer, tags_for
    from stabletrain.tracking.description import NOTE, note_at_start, source_tags
    from stabletrain.tracking.runs import start_run
    from stabletrain.tracking.store_errors import StoreUnreachable

    logger = config["logger"]
    logger["tracking_uri"] = uri
    logger["experiment"] = logger.get("experiment") or config["recipe"]
    logger["save_dir"] = logger.get("save_dir") or config["run_dir"]
    start = partial(
        start_run,
        config,
        experiment=logger["experiment"],
        parent_run_id=parent,
        name=name or Path(config["run_dir"]).name,
        git=git,
        owner=config["launch"].get("kind") != "slurm",  # whose process is on another machine, perhaps much later
    )
    wanted = logger.get("run_id")
    told = {NOTE: note_at_start(config, command), **source_tags(command), **(tags or {})}
    try:
        logger["run_id"] = start(uri=uri, run_id=wanted, tags=told)
    except StoreUnreachable as error:
        logger["tracking_uri"] = open_buffer(Path(config["run_dir"]))
        logger["run_id"] = start(uri=logger["tracking_uri"], tags={**told, **tags_for(uri, wanted)})
        _logger.warning(
            "%s\n  The run is recorded in its folder for now, and sent when it has ended, if the server responds then.",
            error,
        )
    forget_end(logger["tracking_uri"], logger["run_id"])


def continue_run(config: Mapping[str, Any], attempt: int) -> None:
    """Let a run go on in a further attempt: its status is RUNNING again, and a tag has the number of attempts.

    A store that fails is ignored: the worker's logger reopens the run, too.

    Args:
        config: the content of run.yaml.
        attempt: number of the attempt, from 2.
    """

    def go_on(client: Any, run_id: str) -> None:
        from stabletrain.tracking.runs import reopen, write_tags

        reopen(client, run_id)
        write_tags(client, run_id, {ATTEMPTS_TAG: attempt})

    _attempt(config, go_on)


def import_for_end(config: Mapping[str, Any]) -> None:
    """Import what the end of a run needs, if it is tracked; what fails here is reported then.

    Args:
        config: the content of run.yaml.
    """
    if not is_tracked(config):
        return
    with suppress(Exception):
        import_store_of(config)
        from stabletrain.tracking.store import open_client

        open_client(config["logger"]["tracking_uri"])
    with suppress(Exception), importing("matplotlib.figure"):  # without matplotlib there is no picture
        importlib.import_module("matplotlib.figure")


def suspend_run(config: Mapping[str, Any]) -> None:
    """Set a run's status to SCHEDULED: it has stopped, and goes on when its batch job runs again.

    A store that fails is ignored: the status is RUNNING then.

    Args:
        config: the content of run.yaml.
    """
    _attempt(config, lambda client, run_id: client.update_run(run_id, status="SCHEDULED"))


def _attempt(config: Mapping[str, Any], change: Callable[[Any, str], object]) -> None:
    """Call ``change`` with a client of the store and the run's id, if there is one; a store that fails is ignored."""
    if is_tracked(config) and config["logger"].get("run_id"):
        from stabletrain.tracking.sqlite_file import check_file
        from stabletrain.tracking.store import open_client

        uri, run_id = config["logger"]["tracking_uri"], config["logger"]["run_id"]
        with suppress(Exception):
            check_file(uri)
            change(open_client(uri), run_id)


def _status_in(folder: Path) -> Literal["FINISHED", "FAILED", "KILLED"] | None:
    """The status that the result in a run's folder gives; None if there is none."""
    result = read_result(folder) if (folder / RESULT).is_file() else None
    return MLFLOW_STATUS.get(result.end) if result is not None else None


def finish_run(config: Mapping[str, Any], result: Result, *, store: str | None = None) -> str | None:
    """Send the worker's unsent metrics and the run's files to the store, and set the final status.

    If a signal cuts that short by an exception, the status is set nevertheless; the files stay in the run's folder.

    Args:
        config: the resolved config.
        result: how the run ended.
        store: tracking URI of the store to which a buffer is sent; None: the one for which it was made.

    Returns:
        What failed, for the user; None if nothing did.
    """
    if not is_tracked(config) or not config["logger"].get("run_id"):
        return None
    from stabletrain.tracking.artifacts import upload_files
    from stabletrain.tracking.buffer import buffer_uri, send_buffer
    from stabletrain.tracking.checkpoint_models import sync_models
    from stabletrain.tracking.picture import draw
    from stabletrain.tracking.runs import set_final_status, upload_unsent

    folder = Path(config["run_dir"])
    uri, run_id, unsent = config["logger"]["tracking_uri"], config["logger"]["run_id"], folder / UNSENT_METRICS
    target = uri if store is None else store
    try:
        target = store or _store_of(config)
        if uri != buffer_uri(folder):  # the worker began a buffer of its own
            send_buffer(folder, uri)
        if unsent.is_file():
            upload_unsent(uri, unsent, run_id=run_id)
        with suppress(Exception):  # no picture is no reason to say more of a run that has ended
            draw(folder, f"{config['recipe']}, seed {config['seed']}: {result.end}")
        upload_files(uri, run_id, artifacts(folder))
        with suppress(Exception):  # a store that fails is said below
            describe_end(config, result)
            sync_models(uri, run_id, folder, link=True)
        set_final_status(uri, run_id, MLFLOW_STATUS[result.end], force=True)
        _send_buffered(config, target)
    except Exception as error:  # a store that fails must not change the exit code of a run that has ended
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return f"{text}\n  the run's files are complete; send them later with: {_upload_command(config, target)}"
    except BaseException:  # a signal, which matters more than a store that fails
        settle_run(config, result)
        raise
    return None


def _store_of(config: Mapping[str, Any]) -> str:
    """The store of a run; if the run is in a buffer, the one for which it was recorded."""
    from stabletrain.tracking.buffer import SEND_TO, buffer_uri
    from stabletrain.tracking.store import open_client

    logger = config["logger"]
    uri = str(logger["tracking_uri"])
    if uri != buffer_uri(Path(config["run_dir"])):
        return uri
    return str(open_client(uri).get_run(logger["run_id"]).data.tags[SEND_TO])


def _send_buffered(config: Mapping[str, Any], store: str) -> None:
    """Send the run, if it is in a buffer, and write into the config and run.yaml where it is now."""
    from stabletrain.tracking.buffer import buffer_uri, send_buffer

    logger, folder = config["logger"], Path(config["run_dir"])
    if logger["tracking_uri"] != buffer_uri(folder):
        return
    for sent in send_buffer(folder, store, logger["run_id"], any_store=True):
        logger["tracking_uri"], logger["run_id"] = sent.uri, sent.run_id
        write_run_yaml(config)


def _upload_command(config: Mapping[str, Any], store: str) -> str:
    from stabletrain.tracking.store import default_tracking_uri

    other = [] if store == default_tracking_uri() else ["--uri", store]
    return shlex.join(["stabletrain", "upload", str(config["run_dir"]), *other])


def settle_run(config: Mapping[str, Any], result: Result) -> None:
    """Set the final status only, without sending anything; a store that fails is ignored.

    Args:
        config: the resolved config.
        result: how the run ended.
    """
    if is_tracked(config) and config["logger"].get("run_id"):
        from stabletrain.tracking.runs import set_final_status

        with suppress(Exception):
            set_final_status(
                config["logger"]["tracking_uri"], config["logger"]["run_id"], MLFLOW_STATUS[result.end], force=True
            )
