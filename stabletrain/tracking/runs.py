"""A run in the store: create it with everything known before it starts, resume it, and set its final status."""

from __future__ import annotations

import copy
import importlib.metadata
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from stabletrain.runtime.records.run_files import ENVIRONMENT, RUN_YAML
from stabletrain.tracking.artifacts import RESUMES, require_safe_artifacts, require_safe_location, segment_of
from stabletrain.tracking.code_files import OURS, named_packages
from stabletrain.tracking.description import EXPERIMENT, NOTE, note_at_resume, options
from stabletrain.tracking.naming import MAX_NAME, MAX_PARAM, MAX_TAG, chunks, flatten, safe_key, shorten
from stabletrain.tracking.ownership import ELSEWHERE, OWNER, RUN_DIR, abandoned_runs, this_process
from stabletrain.tracking.sqlite_file import check_file
from stabletrain.tracking.store import ensure_store, open_client, store_lock
from stabletrain.tracking.store_errors import StoreError, no_tracebacks, sqlite_path, translate_errors
from stabletrain.tracking.unsent import send_unsent

Status = Literal["FINISHED", "FAILED", "KILLED"]

# these keys say where a run is stored, not what it computes; logging them would make equal runs differ
_NOT_PARAMS = ("run_dir", "resume", "logger", "trust")

_OPEN = ("RUNNING", "SCHEDULED")

_LAUNCH = "stabletrain.launch_id"


def start_run(
    config: Mapping[str, Any],
    *,
    uri: str,
    experiment: str,
    parent_run_id: str | None = None,
    name: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    code: str | Path | None = None,
    git: Mapping[str, Any] | None = None,
    owner: bool = True,
) -> str:
    """Create a run with its parameters, tags, ``run.yaml`` and state in git, or reopen one to resume it.

    The environment is not that of this process: the worker records it.

    Parameters cannot be changed in MLflow, so on a resume those that changed become tags ``changed.<name>``, and the
    artifacts go to ``resume-<n>/``. In the ``run.yaml`` artifact, ``logger.run_id`` is the run's id.

    Args:
        config: the resolved config, the content of ``run.yaml``.
        uri: MLflow tracking URI.
        experiment: name of the experiment, made if missing (a resumed run stays in its own).
        parent_run_id: the run under which MLflow shows this one, e.g. a sweep's.
        name: shown in the UI; None: MLflow chooses one.
        run_id: the run to resume; its status becomes RUNNING again.
        tags: further tags.
        code: folder of the user's code, for its git state; None: the current folder.
        git: the state in git, from `stabletrain.tracking.git_record.git_record`; None: it is read here.
        owner: whether this process owns the run, so that the run is settled if the process is killed; False for a job
            that another machine will run.

    Returns:
        The run's id. If anything ends this function early, Ctrl-C included, the run has a final status.

    Raises:
        StoreError: if the store cannot be used, the experiment is deleted, or ``run_id`` does not exist.
    """
    from stabletrain.tracking.git_record import git_record, write_git

    ensure_store(uri)
    with translate_errors(uri):
        client = open_client(uri)
        state = git if git is not None else git_record(code or Path.cwd(), named_packages(config))
        all_tags = {**describe(config), **git_tags(state), **(owner_tags(config) if owner else {}), **(tags or {})}
        if parent_run_id is not None:
            all_tags["mlflow.parentRunId"] = parent_run_id
        with settled_if_it_fails(uri, run_id) as launch:
            if run_id is None:
                run_id, folder = create_run(uri, experiment, name=name, tags=launch.tags | all_tags), ""
            else:
                resumes = reopen(client, run_id)
                folder = segment_of({RESUMES: str(resumes)})
                if not owner:  # else the process that it had before would count, and has ended
                    all_tags[OWNER] = ELSEWHERE
                all_tags[RESUMES] = str(resumes)
                if NOTE in all_tags:  # what was written about the run so far stays
                    before = client.get_run(run_id).data.tags.get(NOTE)
                    all_tags[NOTE] = all_tags[NOTE] if before is None else note_at_resume(before)
                write_tags(client, run_id, all_tags)
            chosen = options(config.get("choices") or {})
            write_params(client, run_id, chosen)
            named = {key: value for key, value in config.items() if key not in _NOT_PARAMS}
            write_params(client, run_id, {key: value for key, value in named.items() if value or key not in chosen})
            with tempfile.TemporaryDirectory() as scratch:
                (Path(scratch) / RUN_YAML).write_text(_yaml(_with_run_id(config, run_id)), encoding="utf-8")
                write_git(Path(scratch) / ENVIRONMENT, state)
                require_safe_artifacts(client, run_id)
                client.log_artifacts(run_id, scratch, artifact_path=folder or None)
    return run_id


class Launch:
    """One attempt to open a run, recognizable in the store by a tag before the run's id is known.

    Args:
        run_id: of the run; None: it is not created yet.
    """

    def __init__(self, run_id: str | None) -> None:
        self.run_id = run_id
        self.tags = {_LAUNCH: uuid.uuid4().hex}


@contextmanager
def settled_if_it_fails(uri: str, run_id: str | None = None) -> Iterator[Launch]:
    """Set the final status of the run that is opened within, if anything ends the block early.

    KILLED after Ctrl-C and SIGTERM, as far as that raises, else FAILED. A run whose creation was interrupted after the
    store had made it is found by its tag.

    Args:
        uri: MLflow tracking URI.
        run_id: the run; None: one that is created within, with the tags that are given.
    """
    launch = Launch(run_id)
    try:
        yield launch
    except BaseException as error:
        status: Status = "FAILED" if isinstance(error, Exception) else "KILLED"
        with suppress(Exception), no_tracebacks():  # the error that is on its way matters more
            check_file(uri)
            client = open_client(uri)
            found = [launch.run_id] if launch.run_id is not None else _created_by(client, launch)
            for each in found:
                if each is not None:
                    client.set_terminated(each, status)
        raise


def _created_by(client: Any, launch: Launch) -> list[str]:
    experiments = [each.experiment_id for each in client.search_experiments(max_results=1000)]
    found = client.search_runs(experiments, f"tags.`{_LAUNCH}` = '{launch.tags[_LAUNCH]}'")
    return [run.info.run_id for run in found]


def owner_tags(config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the tags that say that this process owns a run.

    Args:
        config: the resolved config; None: there is none.
    """
    folder = (config or {}).get("run_dir")
    return {OWNER: this_process().to_tag()} | ({RUN_DIR: str(folder)} if folder else {})


def settle_abandoned(
    uri: str, status_of: Callable[[Path], Status | None] | None = None, *, of_scripts: bool = False
) -> int:
    """Set the status of runs of this host that are RUNNING although their processes have ended. Never raises.

    Args:
        uri: MLflow tracking URI of a store that `ensure_store` has made ready.
        status_of: returns the status that the result in a run's folder gives; None, also of a run without one: KILLED.
        of_scripts: only those without a folder, which have no other status than this.

    Returns:
        The number of runs.
    """
    settled = 0
    with suppress(Exception), no_tracebacks():
        client = open_client(uri)
        for run_id, tags, reason in abandoned_runs(client):
            if of_scripts and RUN_DIR in tags:
                continue
            known = status_of(Path(tags[RUN_DIR])) if status_of is not None and tags.get(RUN_DIR) else None
            if client.get_run(run_id).info.status == "RUNNING":
                write_tags(client, run_id, {"stabletrain.settled": reason})
                client.set_terminated(run_id, known or "KILLED")
                settled += 1
    return settled


def set_final_status(uri: str, run_id: str, status: Status, *, force: bool = False) -> str:
    """Set a run's final status if it has none yet; may be called several times.

    Args:
        uri: MLflow tracking URI.
        run_id: the run.
        status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        force: whether to overwrite a final status, after an end that the run itself could not record.

    Returns:
        The run's status.

    Raises:
        StoreError: if the store cannot be used.
    """
    with translate_errors(uri):
        client = open_client(uri)
        current: str = client.get_run(run_id).info.status
        if current != status and (force or current in _OPEN):
            client.set_terminated(run_id, status)
            return status
    return current


def upload_unsent(uri: str, path: str | Path, *, run_id: str | None = None) -> int:
    """Send the metrics in a run's ``metrics-unsent.jsonl`` to the store, then delete the file.

    With ``run_id``, the metrics of other runs stay in the file. Sending a metric twice is harmless. What is no metric
    is left out with a warning, but for an incomplete last line, of a process that was killed.

    Args:
        uri: MLflow tracking URI.
        path: the file.
        run_id: of the run whose metrics are sent; None: all runs that the file names.

    Returns:
        The number of metrics sent.

    Raises:
        StoreError: if the store cannot be used; the file is kept.
    """
    with translate_errors(uri):
        check_file(uri, timeout=5.0)
        return send_unsent(open_client(uri), Path(path), run_id=run_id)


def describe(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags that describe a run: version, recipe, plugins, precision, strategy, world size, seed, data.

    Args:
        config: the resolved config, the content of ``run.yaml``; missing parts give no tag.

    >>> tags = describe({"recipe": "char_gpt", "seed": 3, "choices": {"plugins/clip": "zscore", "strategy": "ddp"},
    ...                  "launch": {"processes": 2}, "precision": {"precision": "32-true"}})
    >>> tags["plugins"], tags["precision"], tags["strategy"], tags["world_size"]
    ('clip=zscore', '32-true', 'ddp', '2')
    """
    choices = config.get("choices") or {}
    plugins = {key.removeprefix("plugins/"): value for key, value in choices.items() if key.startswith("plugins/")}
    if not plugins:
        nodes = config.get("plugins") or {}
        plugins = {slot: str(node["_target_"]).rpartition(".")[2] for slot, node in nodes.items() if node}
    launch = config.get("launch") or {}
    data = config.get("data") or {}
    tags = {
        "stabletrain.version": importlib.metadata.version("stabletrain"),
        "recipe": config.get("recipe"),
        "plugins": ",".join(f"{slot}={option}" for slot, option in sorted(plugins.items()) if option != "none"),
        "precision": choices.get("precision") or (config.get("precision") or {}).get("precision"),
        "strategy": choices.get("strategy") or (config.get("strategy") or {}).get("strategy"),
        "world_size": int(launch.get("processes") or 1) * int(launch.get("nodes") or 1) if launch else None,
        "seed": config.get("seed"),
        "data.digest": data.get("sha256") or data.get("digest"),
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def create_run(
    uri: str,
    experiment: str,
    *,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    start_time: int | None = None,
) -> str:
    """Create an empty run (and its experiment if missing) and return its id.

    Args:
        uri: MLflow tracking URI of a store that `ensure_store` has made ready.
        experiment: name of the experiment.
        name: shown in the UI; None: MLflow chooses one.
        tags: tags of the new run.
        start_time: milliseconds since 1970; None: now.

    Raises:
        StoreError: if the experiment is deleted, or its artifacts are at an unsafe place.
    """
    client = open_client(uri)
    with store_lock(uri):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            location = _artifact_location(uri, experiment)
            experiment_id = client.create_experiment(experiment, artifact_location=location, tags={NOTE: EXPERIMENT})
        else:
            experiment_id = found.experiment_id
    if found is not None and found.lifecycle_stage == "deleted":
        raise StoreError(
            f"tracking store: the experiment {experiment!r} was deleted; choose another (logger.experiment) or run "
            f"`MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {experiment_id}`"
        )
    if found is not None:
        require_safe_location(uri, found.artifact_location)
    sent = {safe_key(key): shorten(value, MAX_TAG) for key, value in (tags or {}).items()}
    run = client.create_run(experiment_id, start_time, run_name=name and shorten(name, MAX_NAME), tags=sent)
    return str(run.info.run_id)


def reopen(client: Any, run_id: str) -> int:
    """Set a run's status to RUNNING again and return how many times it has been resumed, including this time."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise StoreError(
            f"tracking store: there is no run {run_id!r} in {client.tracking_uri}; "
            f"correct logger.run_id or MLFLOW_TRACKING_URI"
        ) from None
    require_safe_location(client.tracking_uri, run.info.artifact_uri)
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    return int(run.data.tags.get(RESUMES, 0)) + 1


def last_steps(client: Any, run_id: str) -> dict[str, int]:
    """Return the last step of each metric of a run, by the name under which it is stored.

    Args:
        client: of MLflow.
        run_id: the run.
    """
    return {each.key: int(each.step) for each in client.get_run(run_id).data.to_proto().metrics}


def write_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    """Log nested parameters; those that the run has with another value become tags ``changed.<name>``."""
    from mlflow.entities import Param, RunTag

    wanted = {
        safe_key(key): shorten(value, MAX_PARAM)
        for key, value in flatten(params)
        if not key.endswith(("._partial_", "._recursive_", "._convert_"))
    }
    present = client.get_run(run_id).data.params
    fresh = [Param(key, value) for key, value in wanted.items() if key not in present]
    changed = [
        RunTag(safe_key(f"changed.{key}"), shorten(value, MAX_TAG))
        for key, value in wanted.items()
        if present.get(key, value) != value
    ]
    for part in chunks(fresh, 100):
        client.log_batch(run_id, params=part)
    for part in chunks(changed, 100):
        client.log_batch(run_id, tags=part)


def write_tags(client: Any, run_id: str, tags: Mapping[str, object]) -> None:
    """Set a run's tags in as few requests as MLflow allows."""
    from mlflow.entities import RunTag

    for part in chunks([RunTag(safe_key(key), shorten(value, MAX_TAG)) for key, value in tags.items()], 100):
        client.log_batch(run_id, tags=part)


def _artifact_location(uri: str, experiment: str) -> str | None:
    # beside the database; MLflow's default depends on the current folder of the process that makes the experiment
    path = sqlite_path(uri)
    return None if path is None else (path.parent / "mlartifacts" / safe_key(experiment).replace("/", "_")).as_uri()


def git_tags(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of a state in git; empty if nothing of the run is in a repository.

    Args:
        state: from `stabletrain.tracking.git_state`, or from `stabletrain.tracking.git_record.git_record`: if the
            folder is in no repository, the one that holds a package of the run counts, the user's before ours.
    """
    held = sorted(state.get("repositories", ()), key=lambda each: set(each["packages"]) <= set(OURS))
    state = next((each for each in (state, *held) if each["sha"] is not None), state)
    if state["sha"] is None:
        return {}
    tags = {"git.sha": state["sha"], "git.dirty": str(state["dirty"]).lower(), "mlflow.source.git.commit": state["sha"]}
    return tags | ({"git.branch": state["branch"]} if state["branch"] else {})


def _with_run_id(config: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    filled = copy.deepcopy(dict(config))
    if isinstance(filled.get("logger"), dict):
        filled["logger"]["run_id"] = run_id
    return filled


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
