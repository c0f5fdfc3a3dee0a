"""The Lightning logger: a metric costs the training loop microseconds, and a failing store does not end a run."""

from __future__ import annotations

import atexit
import logging
import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_only

from stabletrain.core import metric_names
from stabletrain.extras import require
from stabletrain.runtime.internals.packages import Logger, both
from stabletrain.runtime.records.run_files import ENVIRONMENT, UNSENT_METRICS, UNSENT_RUNS
from stabletrain.runtime.signal_watch import Interrupted, Terminated
from stabletrain.runtime.stop import EndReached
from stabletrain.tracking import runs
from stabletrain.tracking.artifacts import RESUMES, upload_files, write_artifact
from stabletrain.tracking.buffer import open_buffer, send_buffer, tags_for
from stabletrain.tracking.dataset import data_tags, log_dataset
from stabletrain.tracking.description import source_tags
from stabletrain.tracking.enclosing import enclosing_run, end_autologged, is_autologged
from stabletrain.tracking.end_signals import EndSignals
from stabletrain.tracking.own_record import upload_own_record, write_start
from stabletrain.tracking.ownership import WORKER, this_process
from stabletrain.tracking.sqlite_file import check_file
from stabletrain.tracking.start_record import record_start
from stabletrain.tracking.store import absolute_uri, default_tracking_uri, ensure_store, open_client
from stabletrain.tracking.store_errors import StoreUnreachable, first_line, no_tracebacks, translate_errors
from stabletrain.tracking.system_metrics import SystemMetrics, this_node
from stabletrain.tracking.unsent import send_unsent
from stabletrain.tracking.writer import MetricWriter, Point

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

METRICS = (
    metric_names.MetricInfo("stability_nonfinite/<metric>", "values", "NaN and infinite values of a metric; in MLflow"),
)

log = logging.getLogger(__name__)


class MLflowLogger(Logger):
    """Logs to MLflow from one background thread; ``Trainer(logger=MLflowLogger())`` is enough.

    Lightning's own ``MLFlowLogger`` raises with MLflow 3's defaults, waits for the database at every step, cuts
    parameters at 250 characters, and leaves a resumed run FINISHED; a subclass cannot correct any of this.

    The run is created (or, with ``run_id``, reopened with status RUNNING) when training begins. It ends as FINISHED,
    FAILED (exception) or KILLED (Ctrl-C, SIGTERM and other signals). Within an active MLflow run, of
    ``mlflow.start_run()`` or autologging, nothing is created: all is logged to that run, and whoever started it ends
    it; ``experiment`` and ``run_name`` are ignored then. Metrics that the store does not accept are written to
    ``metrics-unsent.jsonl`` and sent at the end. If the store is a server that does not respond when training begins,
    all is recorded in the folder ``mlflow-unsent``, and sent at the end, or later by ``stabletrain upload``. NaN and
    infinities are stored as NaN and counted by ``stability_nonfinite/<name>``. Names that MLflow does not accept are
    changed and get a hash, so that different ones stay different.

    A run that this logger creates or continues gets a record in ``environment/``: versions, settings, code by content,
    state in git and, if the Trainer has a plugin, data and initial weights by content.

    Args:
        tracking_uri: MLflow store; None: that of the active run, ``MLFLOW_TRACKING_URI``, or else
            ``sqlite:///<current folder>/mlflow.db``.
        experiment: name of the experiment, made if missing.
        run_id: a run to continue; None: the active run, or else a new one.
        run_name: shown in the UI; None: MLflow chooses one.
        save_dir: folder for local files (unsent metrics, and checkpoints of a ModelCheckpoint without ``dirpath``);
            None: the Trainer's ``default_root_dir`` and, for unsent metrics, the current folder.
        tags: tags of the run.
        parent_run_id: the run under which MLflow shows a new one, which is created also within an active run.
        system_metrics: log CPU, memory, disk, network and GPUs (``system/...``) every 10 seconds, but not within an
            active run, for which ``mlflow.start_run`` does it.

    Raises:
        StoreError: when training begins, if the store cannot be used.

    >>> logger = MLflowLogger("sqlite:////tmp/mlflow.db", experiment="demo")
    >>> logger.name, logger.version
    ('demo', None)
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment: str = "stabletrain",
        run_id: str | None = None,
        run_name: str | None = None,
        save_dir: str | os.PathLike[str] | None = None,
        tags: Mapping[str, str] | None = None,
        parent_run_id: str | None = None,
        system_metrics: bool = False,
    ) -> None:
        super().__init__()
        require("mlflow", "MLflowLogger")
        self.tracking_uri = absolute_uri(tracking_uri) if tracking_uri else default_tracking_uri()
        self._given_uri = tracking_uri
        self._given_run_id = run_id
        self._is_enclosing = False
        self._experiment_name = experiment
        self._run_id = run_id
        self._run_name = run_name
        self._save_dir = None if save_dir is None else str(Path(save_dir).absolute())
        self._tags = dict(tags or {})
        self._parent_run_id = parent_run_id
        self._buffered: str | None = None
        self._system_metrics = system_metrics
        self._last_step = 0
        self._session: _Session | None = None
        self.records_itself = True
        """Whether this logger records environment, code and data; False in a run whose launcher's worker does."""
        self._is_recorded = False
        self.repeats = False
        """Whether steps that are in the run already are made again, bit for bit: they are not logged twice."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``mlflow.MlflowClient`` of the run, which is created if necessary; a dummy on ranks other than 0."""
        return self._open().client

    @property
    def run_id(self) -> str | None:
        """The run's id; on rank 0, the run is created if necessary."""
        if _rank() == 0:
            self._open()
        return self._run_id

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self._experiment_name

    @property
    def version(self) -> str | None:
        """The run's id; None before it is created."""
        return self._run_id

    @property
    def save_dir(self) -> str | None:
        """Folder for local files; None if none was given."""
        return self._save_dir

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue metrics for the writer; returns within microseconds.

        Args:
            metrics: numbers or one-element tensors by name; other values are skipped with a warning.
            step: the step that they belong to; None: the last one.
        """
        if step is None:
            step = self._last_step
        self._last_step = step
        try:
            values = {name: float(value) for name, value in metrics.items()}
        except (TypeError, ValueError):
            values = self._numbers_of(metrics)
        self._open().writer.put(values, step)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write parameters, nested ones with dotted names; a value that changed becomes a tag ``changed.<name>``.

        Args:
            params: a mapping, Namespace or dataclass.
            args: ignored (other loggers take metrics here).
            kwargs: ignored.
        """
        if is_dataclass(params) and not isinstance(params, type):
            params = asdict(params)
        nested = vars(params) if isinstance(params, Namespace) else dict(params)
        session = self._open()
        session.attempt("parameters", lambda: runs.write_params(session.client, session.run_id, nested))

    @rank_zero_only
    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Copy a file or folder to the run's artifacts.

        Args:
            path: of the file or folder.
            name: name of the artifact, e.g. ``plots/lr.png``; None: the file's own.

        Raises:
            FileNotFoundError: if ``path`` does not exist.
        """
        source = Path(path)
        if not source.exists():
            raise FileNotFoundError(f"log_artifact: {source} does not exist")
        session = self._open()
        session.attempt(f"artifact {source.name}", lambda: write_artifact(session.client, session.run_id, source, name))

    @rank_zero_only
    def log_text_artifact(self, text: str, name: str) -> None:
        """Write a text to the run's artifacts.

        Args:
            text: the file's content.
            name: of the artifact, e.g. ``parameter_groups.txt``.
        """
        session = self._open()

        def write() -> None:
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "text"
                file.write_text(text, encoding="utf-8")
                write_artifact(session.client, session.run_id, file, name)

        session.attempt(f"artifact {name}", write)

    @rank_zero_only
    def log_record(self, folder: str | os.PathLike[str], data: Mapping[str, Any], *, name: str) -> None:
        """Copy the record of a run to its artifacts, and log its data as a dataset and as the tag ``data.digest``.

        Args:
            folder: with the files of the record; their artifacts lie in a folder of the same name.
            data: the content of data.json, from `stabletrain.tracking.start_record.record_start`.
            name: of the dataset, if the data module does not say one.
        """
        session = self._open()
        session.attempt(f"{Path(folder).name} record", lambda: session.upload(Path(folder)))
        self._log_data(session, data, name)

    @rank_zero_only
    def record_start(self, trainer: Trainer, batch: Any) -> None:
        """Record data and weights by content, if no worker does; the guard calls it. Not a collective.

        Args:
            trainer: in ``on_train_batch_start`` of the first batch.
            batch: that batch.
        """
        if not self.records_itself:
            return
        start = record_start(trainer, batch, alone=True)  # other ranks may have no such logger
        if start is None:
            return
        session = self._open()
        if self._is_enclosing:
            return
        data = start.data

        def write() -> None:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / ENVIRONMENT
                write_start(folder, start)
                session.upload(folder)

        session.attempt("record", write)
        module = getattr(trainer, "datamodule", None)
        self._log_data(session, data, "training data" if module is None else type(module).__name__)

    def _log_data(self, session: _Session, data: Mapping[str, Any], name: str) -> None:
        session.attempt("data tags", lambda: runs.write_tags(session.client, session.run_id, data_tags(data)))
        session.attempt("dataset", lambda: log_dataset(session.client, session.run_id, data, name))

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Write queued metrics, and set tags ``checkpoint.*`` with the checkpoint's path; the file is not copied."""
        if _rank() != 0:
            return
        tags = checkpoint_tags(checkpoint_callback)
        session = self._open()
        session.writer.flush(timeout=5.0)
        session.attempt("checkpoint tags", lambda: runs.write_tags(session.client, session.run_id, tags))

    def save(self) -> None:
        """Do nothing: Lightning calls this after every logged step, but the writer has its own thread; see `flush`."""

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until everything logged so far is written; return False after the timeout.

        Args:
            timeout: seconds.
        """
        return self._session is None or self._session.writer.flush(timeout)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write everything and set the run's final status: FINISHED, FAILED, or KILLED after Ctrl-C or SIGTERM.

        Args:
            status: ``"success"`` or ``"finished"``, ``"killed"`` or ``"aborted"``; any other is a failure.
        """
        if self._session is None:
            return
        # Lightning passes "failed" for every exception, from within its handler
        signals = (KeyboardInterrupt, Interrupted, Terminated, *both(SIGTERMException))
        interrupted = isinstance(sys.exc_info()[1], signals)
        if status in ("success", "finished") or isinstance(sys.exc_info()[1], EndReached):
            final: runs.Status = "FINISHED"
        elif interrupted or status in ("killed", "aborted"):
            final = "KILLED"
        else:
            final = "FAILED"
        session, self._session = self._session, None
        session.close(final)

    def _numbers_of(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        values = {}
        for name, value in metrics.items():
            try:
                values[name] = float(value)
            except (TypeError, ValueError):
                log.warning("metric %s is not a number (%s) and is skipped", name, type(value).__name__)
        return values

    def _open(self) -> _Session:
        session = self._session
        if session is not None and session.writer.pid == os.getpid():
            return session
        self._look_around()
        ensure_store(self.tracking_uri)
        if self._is_enclosing:
            return self._join()
        try:
            return self._begin()
        except StoreUnreachable as error:
            return self._begin_in_buffer(error)

    def _begin(self) -> _Session:
        self._send_buffered()
        with translate_errors(self.tracking_uri), runs.settled_if_it_fails(self.tracking_uri, self._run_id) as launch:
            client = open_client(self.tracking_uri)
            is_new = self._run_id is None
            if self._run_id is None:
                runs.settle_abandoned(self.tracking_uri, of_scripts=True)
                self._run_id = self._create(client, launch)
            else:
                resumes = runs.reopen(client, self._run_id)
                tags = {WORKER: this_process().to_tag()}
                is_resumed = self.records_itself and not self._is_recorded and self._given_run_id is not None
                runs.write_tags(client, self._run_id, tags | ({RESUMES: str(resumes)} if is_resumed else {}))
                if is_resumed:
                    self._is_recorded = True
                    upload_own_record(self.tracking_uri, self._run_id)
            end = partial(_set_terminated, client, self._run_id)
            self._session = _Session(
                client, self._run_id, self._unsent, end=end, ends_at_signals=is_new, repeats=self.repeats
            )
            if self._system_metrics:
                self._session.system = SystemMetrics(client.tracking_uri, self._run_id, this_node())
        return self._session

    def _look_around(self) -> None:
        """Find the run around this one. A logger that is used in several, one after the other, changes with them."""
        if self._parent_run_id is not None:
            return
        found = enclosing_run(self._given_uri)
        if found is None or self._given_run_id not in (None, found.run_id):
            return
        if self._run_id in (None, found.run_id) or self._is_enclosing:
            self._run_id, self.tracking_uri, self._is_enclosing = found.run_id, found.tracking_uri, True

    def _begin_in_buffer(self, error: StoreUnreachable) -> _Session:
        """Record the run in a local database; it is sent at its end."""
        uri = open_buffer(self._folder)
        client = open_client(uri)
        if self._buffered is None:
            tags = {**runs.describe({}), **self._tags, **tags_for(self.tracking_uri, self._run_id), **runs.owner_tags()}
            if self._parent_run_id is not None:
                tags["mlflow.parentRunId"] = self._parent_run_id
            self._buffered = runs.create_run(uri, self._experiment_name, name=self._run_name, tags=tags)
            self._run_id = self._run_id or self._buffered
        else:
            runs.reopen(client, self._buffered)
        buffered = self._buffered
        log.warning("%s\n  The run is recorded in %s for now, and sent at its end.", error, self._folder / UNSENT_RUNS)

        def end(status: str) -> None:
            client.set_terminated(buffered, status)
            self._send_buffered()

        self._session = _Session(client, buffered, self._unsent, end=end, ends_at_signals=True)
        return self._session

    def _send_buffered(self) -> None:
        """Send a run that was recorded while the server did not respond."""
        if self._buffered is not None:
            try:
                for sent in send_buffer(self._folder, self.tracking_uri, self._buffered, any_store=True):
                    self._run_id = sent.run_id
            except StoreUnreachable as error:
                command = shlex.join(["stabletrain", "upload", str(self._folder), "--uri", self.tracking_uri])
                raise StoreUnreachable(f"{error}; send it later with: {command}") from error
            self._buffered = None

    def _join(self) -> _Session:
        """Log to a run of somebody else, whose status, tags and artifacts are left as they are."""
        assert self._run_id is not None
        with translate_errors(self.tracking_uri):
            client = open_client(self.tracking_uri)
            run = client.get_run(self._run_id)
            self._experiment_name = str(client.get_experiment(run.info.experiment_id).name)
            if self._tags:
                runs.write_tags(client, self._run_id, self._tags)
            end = partial(end_autologged, self._run_id) if is_autologged(run) else None
            self._session = _Session(client, self._run_id, self._unsent, end=end, ends_at_signals=end is not None)
        log.info("logging to the active MLflow run %s", self._run_id)
        return self._session

    @property
    def _folder(self) -> Path:
        return Path(self._save_dir or Path.cwd())

    @property
    def _unsent(self) -> Path:
        return self._folder / UNSENT_METRICS

    def _create(self, client: Any, launch: runs.Launch) -> str:
        from stabletrain.tracking.git import git_state

        tags = {**runs.describe({}), **source_tags(), **runs.git_tags(git_state(Path.cwd())), **runs.owner_tags()}
        tags |= self._tags
        if self._parent_run_id is not None:
            tags["mlflow.parentRunId"] = self._parent_run_id
        run_id = runs.create_run(self.tracking_uri, self._experiment_name, name=self._run_name, tags=launch.tags | tags)
        self._is_recorded = True
        upload_own_record(self.tracking_uri, run_id)
        return run_id

    def __getstate__(self) -> dict[str, Any]:
        # threads and database connections cannot be copied; a copy in another process opens its own, to the same run
        if self._session is None and _rank() == 0:
            self._look_around()
        return {**self.__dict__, "_session": None}


class _Session:
    """Client and writer of one run in one process; sets the final status at exit if `finalize` was not called.

    Args:
        client: of MLflow.
        run_id: the run.
        unsent: file for metrics that the store does not accept.
        end: ends the run with a status; None: it is somebody else's.
        ends_at_signals: whether it is ended, too, when a signal ends the process.
        repeats: whether values of steps that the run has already are the same, and left out.
    """

    def __init__(
        self,
        client: Any,
        run_id: str,
        unsent: Path,
        *,
        end: Callable[[str], None] | None,
        ends_at_signals: bool,
        repeats: bool = False,
    ) -> None:
        self.client = client
        self._end = end
        self.run_id = run_id
        metrics = client.get_run(run_id).data.metrics
        counts = {
            key.removeprefix(prefix): int(value)
            for prefix in ("nonfinite/", metric_names.NONFINITE)  # the first of runs that an earlier version began
            for key, value in metric_names.renamed(metrics).items()
            if key.startswith(prefix)
        }
        logged = runs.last_steps(client, run_id) if repeats else {}
        self.writer = MetricWriter(self._send, unsent, run_id, nonfinite=counts, logged=logged)
        self.system: SystemMetrics | None = None
        self._waiting: dict[str, Callable[[], None]] = {}
        self._signals = EndSignals(lambda: self.close("KILLED")) if ends_at_signals else None
        atexit.register(self._at_exit)

    def close(self, status: runs.Status) -> None:
        """Write everything, then set the final status; log one warning for what the store does not accept."""
        atexit.unregister(self._at_exit)
        with self._postponed():
            self._close(status)
        if self._signals is not None:
            self._signals.remove()

    def _close(self, status: runs.Status) -> None:
        if self.system is not None:
            self.system.stop()
        self.writer.close()
        if self.writer.unsent.is_file():
            self._waiting[f"metrics in {self.writer.unsent}"] = self._send_unsent
        if self._end is not None:
            self._waiting["final status"] = partial(self._end, status)
        failed: dict[str, Exception] = {}
        for what, action in self._waiting.items():
            # what has failed once is not waited for again
            error = self._try(action, waits=(0.1, 1.0) if not (failed or self.writer.failing) else ())
            if error is not None:
                failed[what] = error
        self._waiting = {}
        if failed:
            why = first_line(next(iter(failed.values())))
            log.warning("MLflow does not accept the %s of run %s: %s", ", ".join(failed), self.run_id, why)

    def attempt(self, what: str, action: Callable[[], None]) -> None:
        """Call ``action``; if it fails, it is called again at the end of the run. Does not raise.

        Args:
            what: is written, for the message; a later action of the same name replaces one that waits.
            action: writes it.
        """
        self._waiting.pop(what, None)
        if self.writer.failing or self._try(action, waits=(0.1,)) is not None:
            self._waiting[what] = action

    def upload(self, folder: Path) -> None:
        """Copy a folder of files to the artifacts."""
        upload_files(self.client.tracking_uri, self.run_id, [folder])

    def _postponed(self) -> AbstractContextManager[None]:
        return nullcontext() if self._signals is None else self._signals.postponed()

    def _try(self, action: Callable[[], None], waits: Sequence[float]) -> Exception | None:
        """Call ``action``, and again after each of ``waits`` (seconds); return the last error, None: it succeeded."""
        error: Exception | None = None
        for wait in (0.0, *waits):
            time.sleep(wait)
            started = time.monotonic()
            try:
                with self._postponed(), no_tracebacks():
                    check_file(self.client.tracking_uri)
                    action()
            except Exception as caught:
                error = caught
                if time.monotonic() - started > 5.0:
                    break
            else:
                return None
        return error

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        with no_tracebacks():
            check_file(self.client.tracking_uri)
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in points])

    def _send_unsent(self) -> None:
        send_unsent(self.client, self.writer.unsent, run_id=self.run_id)

    def _at_exit(self) -> None:
        if self.writer.pid != os.getpid():
            return
        last = getattr(sys, "last_value", None)
        if isinstance(last, KeyboardInterrupt):
            self.close("KILLED")
        else:
            self.close("FINISHED" if last is None else "FAILED")


def _set_terminated(client: Any, run_id: str, status: str) -> None:
    client.set_terminated(run_id, status)


def _rank() -> int:
    # an attribute of the decorator, which Lightning sets before any logger is used
    return int(getattr(rank_zero_only, "rank", 0))


def checkpoint_tags(callback: ModelCheckpoint) -> dict[str, str]:
    """Return tags with the paths of a ModelCheckpoint's last and best checkpoints.

    Args:
        callback: a ModelCheckpoint that has just saved.
    """
    # path and step of the last save are private attributes of Lightning
    path, step = getattr(callback, "_last_checkpoint_saved", ""), getattr(callback, "_last_global_step_saved", None)
    tags = {"checkpoint.last": str(path or callback.last_model_path), "checkpoint.last_step": str(step)}
    if callback.best_model_path:
        tags["checkpoint.best"] = str(callback.best_model_path)
    if callback.monitor and callback.best_model_score is not None:
        tags["checkpoint.best_score"] = f"{callback.monitor}={float(callback.best_model_score):.8g}"
    return tags
