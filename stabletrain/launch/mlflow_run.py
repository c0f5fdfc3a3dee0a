"""The launcher's part of tracking: create the MLflow run before the worker starts, set its final status at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from stabletrain.errors import UserError
from stabletrain.launch.result import MLFLOW_STATUS, Result, read_result
from stabletrain.launch.run_end import describe_end, forget_end
from stabletrain.runtime.records.run_files import RESULT, UNSENT_METRICS, artifacts

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
    if not is_tracked(config):
        return None
    from stabletrain.tracking.runs import settle_abandoned
    from stabletrain.tracking.store import absolute_uri, default_tracking_uri, ensure_store

    wanted = config["logger"].get("tracking_uri")
    if not isinstance(wanted, str | None):
        raise UserError(f"logger.tracking_uri: expected text or null, got {wanted!r:.200}")
    uri = absolute_uri(wanted) if wanted else default_tracking_uri()
    ensure_store(uri)
    settle_abandoned(uri, _status_in)
    return uri


def open_run(
    config: dict[str, Any],
    uri: str,
    *,
    parent: str | None = None,
    name: str | None = None,
    command: Sequence[str] = (),
) -> None:
    """Create the run in the store, and write its id and location into the config.

    Args:
        config: the resolved config; its ``logger`` node is completed.
        uri: tracking URI of the store.
        parent: id of the sweep's run; None outside a sweep.
        name: shown in MLflow; None: the folder's name.
        command: the command line.

    Raises:
        UserError: if the store cannot be used.
    """
    from stabletrain.tracking.description import NOTE, note_at_start, source_tags
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
        tags={NOTE: note_at_start(config, command), **source_tags(command)},
        owner=config["launch"].get("kind") != "slurm",  # whose process is on another machine, perhaps much later
    )
    forget_end(uri, logger["run_id"])


def open_sweep(uri: str, experiment: str, command: Sequence[str]) -> str:
    """Create the parent run of a sweep's jobs, and return its id.

    Args:
        uri: tracking URI of the store.
        experiment: name of the experiment.
        command: the command line.
    """
    from stabletrain.tracking.description import as_typed, source_tags
    from stabletrain.tracking.runs import create_run, owner_tags, settled_if_it_fails

    tags = {"stabletrain.command": as_typed(command), "stabletrain.sweep": "true"}
    tags |= {**source_tags(command), **owner_tags()}
    with settled_if_it_fails(uri) as launch:
        return create_run(uri, experiment, name="sweep", tags=launch.tags | tags)


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


def _status_in(folder: Path) -> Literal["FINISHED", "FAILED", "KILLED"] | None:
    """The status that the result in a run's folder gives; None if there is none."""
    result = read_result(folder) if (folder / RESULT).is_file() else None
    return MLFLOW_STATUS.get(result.end) if result is not None else None


def finish_run(config: Mapping[str, Any], result: Result) -> str | None:
    """Send the worker's unsent metrics and the run's files to the store, and set the final status.

    If a signal cuts that short by an exception, the status is set nevertheless; the files stay in the run's folder.

    Args:
        config: the resolved config.
        result: how the run ended.

    Returns:
        What failed, for the user; None if nothing did.
    """
    if not is_tracked(config) or not config["logger"].get("run_id"):
        return None
    from stabletrain.tracking.artifacts import upload_files
    from stabletrain.tracking.checkpoint_models import sync_models
    from stabletrain.tracking.picture import draw
    from stabletrain.tracking.runs import set_final_status, upload_unsent

    folder = Path(config["run_dir"])
    uri, run_id, unsent = config["logger"]["tracking_uri"], config["logger"]["run_id"], folder / UNSENT_METRICS
    try:
        if unsent.is_file():
            upload_unsent(uri, unsent, run_id=run_id)
        with suppress(Exception):  # no picture is no reason to say more of a run that has ended
            draw(folder, f"{config['recipe']}, seed {config['seed']}: {result.end}")
        upload_files(uri, run_id, artifacts(folder))
        with suppress(Exception):  # a store that fails is said below
            describe_end(config, result)
            sync_models(uri, run_id, folder, link=True)
        set_final_status(uri, run_id, MLFLOW_STATUS[result.end], force=True)
    except Exception as error:  # a store that fails must not change the exit code of a run that has ended
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return f"{text}\n  the run's files are complete, in {config['run_dir']}"
    except BaseException:  # a signal, which matters more than a store that fails
        settle_run(config, result)
        raise
    return None


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
