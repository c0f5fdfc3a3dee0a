"""Find a run that was recorded, and read what it has recorded: from its folder, or from the tracking store.

What is read may come from anybody: names of files are ours, files are regular ones, values are checked where they are
used. A config that is read here is built only after the checks of `stabletrain.config`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from stabletrain.config.yaml_file import read_yaml
from stabletrain.core import metric_names
from stabletrain.core.events import Event
from stabletrain.errors import UserError, did_you_mean
from stabletrain.launch.result import MLFLOW_STATUS, read_result
from stabletrain.runtime.records.json_lines import read_lines
from stabletrain.runtime.records.regular_file import only_regular
from stabletrain.runtime.records.run_files import EVENTS, RUN_YAML, STEPS
from stabletrain.runtime.records.steps_file import Steps, read_steps

_ID = re.compile(r"[0-9a-f]{4,32}")
_MANY = 10
"""Runs that a message lists."""
_LARGEST_CONFIG = 1 << 20
"""Bytes of run.yaml in which a run's id is looked for."""


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run and what it has recorded.

    Args:
        run_id: in the store; None for a folder whose run is in no store that can be read.
        uri: tracking URI of the store; None if there is none.
        name: of the run, or of its folder.
        experiment: name of the experiment; empty without a store.
        experiment_id: its id.
        status: ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``; ``UNKNOWN`` for a folder without a result.
        params: by name.
        tags: by name.
        metrics: the last values by their present names.
        start_ms: milliseconds since 1970; None if unknown.
        end_ms: the same; None while it runs.
        folder: the run's folder, if it is on this machine.
    """

    run_id: str | None = None
    uri: str | None = None
    name: str
    experiment: str = ""
    experiment_id: str = ""
    status: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    logged_names: Mapping[str, str] = field(default_factory=dict)
    """Present name of a metric -> the one under which it was logged."""
    start_ms: int | None = None
    end_ms: int | None = None
    folder: Path | None = None
    unread: str | None = None
    """Tracking URI that its folder names, of a store that was not read: it is not the user's. None: there is none."""

    def segments(self) -> list[str]:
        """The folders of the artifacts: ``""`` of the first start, then ``resume-1``, ``resume-2`` ..."""
        found = [path for path in self._artifacts_in("") if re.fullmatch(r"resume-[0-9]{1,9}", path)]
        return ["", *sorted(found, key=lambda each: int(each.removeprefix("resume-")))]

    def file(self, name: str, segment: str | None = None) -> Path | None:
        """Return a file that the run has recorded, downloaded if need be; None if there is none.

        Args:
            name: such as ``steps.bin`` or ``environment/code.json``.
            segment: the part of a resumed run, from `segments`; None: the newest that has the file, and the run's
                folder before all of them.

        Raises:
            StoreError: if the store cannot be read.
        """
        if segment is None and self.folder is not None and _is_regular(self.folder / name):
            return self.folder / name
        for each in reversed(self.segments()) if segment is None else [segment]:
            path = f"{each}/{name}" if each else name
            if path in self._artifacts_in(path.rpartition("/")[0]):
                return self._download(path)
        return None

    def config(self, segment: str | None = None) -> dict[str, Any] | None:
        """Return the content of run.yaml; None if there is none. It is only read: nothing in it is checked or built.

        Args:
            segment: see `file`.

        Raises:
            UserError: if it is no YAML.
        """
        path = self.file(RUN_YAML, segment)
        return None if path is None else read_yaml(path, exponents=False)

    def steps(self) -> Steps | None:
        """Return the record of every attempted step; None if there is none. It is read once."""
        return self._steps

    @cached_property
    def _steps(self) -> Steps | None:
        path = self.file(STEPS)
        if path is None:
            return None
        with suppress(OSError):
            return read_steps(path)
        return None

    def events(self) -> list[Event]:
        """Return the events that the plugins have logged, in order; what is no event is left out. Read once."""
        return self._events

    @cached_property
    def _events(self) -> list[Event]:
        path = self.file(EVENTS)
        if path is None:
            return []
        with suppress(OSError):
            return [event for line in read_lines(path) if line.record and (event := _event(line.record)) is not None]
        return []

    def history(self, metric: str) -> list[tuple[int, float]]:
        """Return the logged values of a metric, by step; a step that was logged again has its last value.

        Args:
            metric: present or old name.

        Raises:
            StoreError: if the store cannot be read.
        """
        name = metric_names.find(metric, self.metrics)
        if name is None or self.run_id is None or self.uri is None:
            return []
        with _store_errors(self.uri):
            points = _client(self.uri).get_metric_history(self.run_id, self.logged_names.get(name, name))
        return sorted({point.step: point.value for point in points}.items())

    def _artifacts_in(self, folder: str) -> set[str]:
        if self.run_id is None or self.uri is None:
            return set()
        if folder not in self._listed:
            with _store_errors(self.uri):
                self._listed[folder] = {
                    found.path for found in _client(self.uri).list_artifacts(self.run_id, folder or None)
                }
        return self._listed[folder]

    @cached_property
    def _listed(self) -> dict[str, set[str]]:
        return {}

    @cached_property
    def _scratch(self) -> Path:
        folder = tempfile.mkdtemp(prefix="stabletrain-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def _download(self, path: str) -> Path | None:
        if path not in self._downloaded:
            assert self.uri is not None
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            folder = self._scratch / str(len(self._downloaded))
            folder.mkdir()
            with _store_errors(self.uri):
                self._downloaded[path] = Path(_client(self.uri).download_artifacts(self.run_id, path, str(folder)))
        return self._downloaded[path] if _is_regular(self._downloaded[path]) else None

    @cached_property
    def _downloaded(self) -> dict[str, Path]:
        return {}


def find_run(wanted: str, *, command: str, uri: str | None = None, what: str = "run") -> RecordedRun:
    """Return the run that a word names.

    Args:
        wanted: the run's folder, its id, the beginning of an id (four characters or more), or its name.
        command: begins the messages, such as ``report``.
        uri: tracking URI of the store; None: ``MLFLOW_TRACKING_URI`` or mlflow.db in the current folder.
        what: there is none of, in the message, such as ``file and no run``.

    Raises:
        UserError: if there is no such run, or several, which are listed; or if the store cannot be read.
    """
    if Path(wanted).is_dir():
        return run_in_folder(Path(wanted), command=command, uri=uri)
    if "/" in wanted:
        raise UserError(f"{command}: there is no folder {wanted}; expected a run's folder, its id or its name")
    store = _ready(uri)
    with _store_errors(store):
        client = _client(store)
        experiments = {each.experiment_id: each.name for each in client.search_experiments(max_results=1000)}
        found = _search(client, experiments, wanted)
        if len(found) == 1:
            return _of_store(found[0], store, experiments)
        if not found:
            raise _nothing(command, what, wanted, store, client, experiments)
    lines = "".join(f"\n  {_line(run, experiments)}" for run in found[:_MANY])
    more = "" if len(found) <= _MANY else f"\n  and {len(found) - _MANY} more"
    raise UserError(f"{command}: {wanted} fits {len(found)} runs; name one by its id:{lines}{more}")


def find_runs(
    *, command: str, experiment: str, query: str = "", limit: int = 50, uri: str | None = None
) -> list[RecordedRun]:
    """Return the runs of an experiment, the newest first.

    Args:
        command: begins the messages.
        experiment: its name.
        query: a filter in MLflow's language, such as ``metrics.`val/loss` < 2``; empty: all runs.
        limit: the maximum number of runs, >= 1.
        uri: see `find_run`.

    Raises:
        UserError: if there is no such experiment, the filter is wrong, or the store cannot be read.
    """
    from mlflow.exceptions import MlflowException

    store = _ready(uri)
    with _store_errors(store):
        client = _client(store)
        known = client.get_experiment_by_name(experiment)
        if known is None:
            names = sorted(each.name for each in client.search_experiments(max_results=1000))
            raise UserError(
                f"{command}: there is no experiment {experiment!r} in {store}; choose one of: "
                f"{', '.join(names) or 'none'}"
            )
        try:
            found = client.search_runs([known.experiment_id], query, max_results=limit)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise UserError(f"{command}: the filter {query!r} is wrong: {error.message}") from None
        return [_of_store(run, store, {known.experiment_id: experiment}) for run in found]


def _search(client: Any, experiments: Mapping[str, str], wanted: str) -> list[Any]:
    """The runs with an id that begins so; if there are none, those with this name."""
    quote = '"' if "'" in wanted else "'"
    queries = [f"attributes.run_id LIKE '{wanted}%'"] if _ID.fullmatch(wanted) else []
    if not ("'" in wanted and '"' in wanted):
        queries.append(f"attributes.run_name = {quote}{wanted}{quote}")
    for query in queries:
        if found := list(client.search_runs(list(experiments), query, max_results=1000)):
            return found
    return []


def _nothing(
    command: str, what: str, wanted: str, store: str, client: Any, experiments: Mapping[str, str]
) -> UserError:
    newest = client.search_runs(list(experiments), max_results=200, order_by=["attributes.start_time DESC"])
    hint = did_you_mean(wanted, [run.info.run_name or "" for run in newest])
    return UserError(
        f"{command}: there is no {what} {wanted} in {store} (another store: MLFLOW_TRACKING_URI); expected a run's "
        f"folder, its id, the beginning of an id, or its name{hint}"
    )


def _line(run: Any, experiments: Mapping[str, str]) -> str:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime((run.info.start_time or 0) / 1000))
    experiment = experiments.get(run.info.experiment_id, "")
    return f"{run.info.run_id}  {run.info.run_name}  {experiment}  {started}  {run.info.status}"


def _of_store(run: Any, uri: str, experiments: Mapping[str, str]) -> RecordedRun:
    from stabletrain.tracking.ownership import RUN_DIR

    info, params = run.info, dict(run.data.params)
    of_recipe = params.get("model._target_", "").startswith("stabletrain.workloads.")
    names = metric_names.renamed({name: name for name in run.data.metrics}, of_recipe=of_recipe)
    folder = Path(run.data.tags[RUN_DIR]) if run.data.tags.get(RUN_DIR) else None
    return RecordedRun(
        run_id=info.run_id,
        uri=uri,
        name=info.run_name or info.run_id[:8],
        experiment=experiments.get(info.experiment_id, ""),
        experiment_id=info.experiment_id,
        status=info.status,
        params=params,
        tags=dict(run.data.tags),
        metrics={name: run.data.metrics[logged] for name, logged in names.items()},
        logged_names=names,
        start_ms=info.start_time,
        end_ms=info.end_time,
        folder=folder if folder is not None and belongs_to(folder, info.run_id) else None,
    )


def run_of_folder(folder: Path, *, command: str, uri: str | None) -> RecordedRun | None:
    """Return the run that a folder is of, also if only the store still knows it; None if there is none.

    Args:
        folder: absolute path, such as that of the checkpoint from which another run was resumed.
        command: begins the messages.
        uri: tracking URI of the store; None: there is none.

    Raises:
        UserError: if the store cannot be read.
    """
    if _is_regular(folder / RUN_YAML):
        return run_in_folder(folder, command=command, uri=uri)
    if uri is None or "'" in str(folder):
        return None
    from stabletrain.tracking.ownership import RUN_DIR

    with _store_errors(uri):
        client = _client(uri)
        experiments = {each.experiment_id: each.name for each in client.search_experiments(max_results=1000)}
        found = client.search_runs(list(experiments), f"tags.`{RUN_DIR}` = '{folder}'", max_results=1)
        return _of_store(found[0], uri, experiments) if found else None


def belongs_to(folder: Path, run_id: str) -> bool:
    """Whether a folder, which a store names, is this run's: the store may come from another machine.

    Args:
        folder: any path.
        run_id: of the run.
    """
    with suppress(OSError), open(folder / RUN_YAML, "rb", opener=only_regular) as file:
        # the line alone: parsing the file takes 15 ms, of each of the runs of an experiment
        wanted = rf"\brun_id: ['\"]?{re.escape(run_id)}\b"
        return re.search(wanted.encode(), file.read(_LARGEST_CONFIG)) is not None
    return False


def _logger(folder: Path) -> Mapping[str, Any]:
    node = read_yaml(folder / RUN_YAML, exponents=False).get("logger")
    return node if isinstance(node, Mapping) else {}


def run_in_folder(folder: Path, *, command: str, uri: str | None = None, remote: bool = True) -> RecordedRun:
    """Return the run in a folder, with what its store has recorded if it can be read.

    The store that run.yaml names is asked only if it is the user's own one: a folder from elsewhere must not decide
    which server gets the user's credentials, or which database is opened.

    Args:
        folder: the run's folder.
        command: begins the messages.
        uri: tracking URI of the user's store; None: ``MLFLOW_TRACKING_URI`` or mlflow.db in the current folder.
        remote: whether to ask a store that is no file on this machine, which may take long.

    Raises:
        UserError: if it is not the folder of a run.
    """
    if not (folder / RUN_YAML).is_file():
        raise UserError(f"{command}: {folder} is not the folder of a run: it has no {RUN_YAML}; name a run's folder")
    node = _logger(folder)
    run_id, named = node.get("run_id"), node.get("tracking_uri")
    if isinstance(run_id, str) and isinstance(named, str) and _is_own(named, uri, remote=remote):
        with suppress(UserError):  # the folder has most of what the store has
            from mlflow.exceptions import MlflowException

            with suppress(MlflowException), _store_errors(_ready(named)):
                client = _client(named)
                run = client.get_run(run_id)
                experiment = client.get_experiment(run.info.experiment_id)
                found = _of_store(run, named, {experiment.experiment_id: experiment.name})
                return replace(found, folder=folder)
    result = read_result(folder)
    return RecordedRun(
        name=folder.resolve().name,
        status="UNKNOWN" if result is None else MLFLOW_STATUS[result.end],
        metrics={} if result is None else metric_names.renamed(result.metrics),
        folder=folder,
        unread=named if isinstance(named, str) and not _is_own(named, uri, remote=True) else None,
    )


def _is_own(named: str, uri: str | None, *, remote: bool) -> bool:
    from stabletrain.tracking.store import absolute_uri, default_tracking_uri
    from stabletrain.tracking.store_errors import sqlite_path

    own = absolute_uri(uri) if uri else default_tracking_uri()
    return absolute_uri(named) == own and (remote or sqlite_path(own) is not None)


def _event(record: Mapping[str, Any]) -> Event | None:
    """An event from its JSON; None if it is none."""
    try:
        found = Event(**record)
        return found._replace(
            step=int(found.step), value=float(found.value), limit=float(found.limit), samples=tuple(found.samples)
        )
    except (TypeError, ValueError):
        return None


def _is_regular(path: Path) -> bool:
    try:
        with open(path, "rb", opener=only_regular):
            return True
    except OSError:
        return False


def _ready(uri: str | None) -> str:
    from stabletrain.tracking.store import absolute_uri, default_tracking_uri, require_store

    store = absolute_uri(uri) if uri else default_tracking_uri()
    require_store(store)
    _ensure_once(store)
    return store


@lru_cache(maxsize=8)
def _ensure_once(store: str) -> None:
    """Make a store ready the first time: that takes 50 ms, and a comparison names twenty runs."""
    from stabletrain.tracking.store import ensure_store

    ensure_store(store)


def _client(uri: str) -> Any:
    from stabletrain.tracking.store import open_client

    return open_client(uri)


def _store_errors(uri: str) -> Any:
    from stabletrain.tracking.store_errors import translate_errors

    return translate_errors(uri)
