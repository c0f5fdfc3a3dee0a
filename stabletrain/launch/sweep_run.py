"""The MLflow run above the jobs of a sweep: named for what varies, with a chart and a table of the jobs' results."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stabletrain.core import metric_names
from stabletrain.errors import did_you_mean
from stabletrain.launch.result import MLFLOW_STATUS, Result
from stabletrain.launch.sweep_text import SweepJob, head, objective_of, table
from stabletrain.tracking.description import as_typed, source_tags

_logger = logging.getLogger("stabletrain")

TABLE = "comparison.csv"
"""Artifact with the comparison of the jobs."""
PAGE = "comparison.html"
"""The same as a page with charts."""
_MOST_RUNS = 50
"""Runs on that page."""


class SweepRun:
    """Opens the run above the jobs with the first of them, and completes it job by job.

    Args:
        command: words of the command line.
        name: of the run, such as that of `sweep_name`.
        count: of the jobs.
        objective: name of the metric that is compared; None: the one that the jobs' configs ask for, else the loss.
    """

    def __init__(self, command: Sequence[str], name: str, count: int, objective: str | None = None) -> None:
        self.name = name
        self._words = command
        self._command = as_typed(command)
        self._count = count
        self._wanted = objective
        self._opened: tuple[str, str] | None = None
        self._jobs: list[SweepJob] = []
        self._objectives: dict[str, str] = {}
        self._logged: set[int] = set()

    def open(self, uri: str, experiment: str) -> str | None:
        """Return the id of the run, which the first call creates; None if the server does not respond.

        Args:
            uri: tracking URI of the store.
            experiment: name of the experiment.
        """
        if self._opened is None:
            from stabletrain.tracking.latest import SWEEP
            from stabletrain.tracking.runs import create_run, owner_tags, settled_if_it_fails
            from stabletrain.tracking.store_errors import StoreUnreachable, translate_errors

            tags = {
                SWEEP: "true",
                "stabletrain.command": self._command,
                **source_tags(self._words),
                "mlflow.note.content": head(self._command, self._count),
                **owner_tags(),
            }
            try:
                with translate_errors(uri), settled_if_it_fails(uri) as launch:
                    run_id = create_run(uri, experiment, name=self.name, tags=launch.tags | tags)
            except StoreUnreachable:  # as the jobs say, whose runs are sent later, without this one
                return None
            self._opened = uri, run_id
        return self._opened[1]

    def add(self, job: SweepJob) -> None:
        """Add a job that has ended: a point of its objective, at its number. Does not raise.

        A job that did not finish has the point NaN, once a job has finished, and it is known which metric is compared.

        Args:
            job: the job.
        """
        self._jobs.append(job)
        if self._opened is None:
            return
        objective = self._objective(job)
        if objective is not None:
            jobs = [each for each in self._jobs if each.recipe == job.recipe and each.result is not None]
            points = {each.number: self._value(each) for each in jobs if each.number not in self._logged}
            self._logged.update(points)
            self._attempt("a point", lambda client, run_id: _log(client, run_id, objective, points))

    def finish(self, last: Result | None = None) -> None:
        """Write the comparison of the jobs, and set the final status, the worst of the jobs'. Does not raise.

        Args:
            last: of a job that could not be started, and ended the sweep; None: there was none.
        """
        if self._opened is None:
            return
        results = [*(job.result for job in self._jobs if job.result is not None), *([last] if last else [])]
        unfinished = [f"{job.number} ({job.end})" for job in self._jobs if job.failed]
        tags = {"mlflow.note.content": self._description()}
        if unfinished:
            tags["stabletrain.sweep.unfinished"] = ", ".join(unfinished)
        ids = [job.run_id for job in self._jobs if job.run_id is not None]
        status = next((each for each in ("FAILED", "KILLED") if each in _statuses(results)), "FINISHED")
        self._attempt("a description", lambda client, run_id: _write_tags(client, run_id, tags))
        if len(ids) > 1:
            self._attempt("a table", lambda client, run_id: _write_table(client, run_id, ids))
            self._attempt("a page", lambda client, run_id: _write_page(client, run_id, ids[:_MOST_RUNS], self.name))
        self._attempt("a final status", lambda client, run_id: client.set_terminated(run_id, status))

    def _attempt(self, what: str, action: Callable[[Any, str], object]) -> None:
        """Call ``action``: a store that fails is no reason to end a sweep, whose jobs have their own runs."""
        from stabletrain.tracking.sqlite_file import check_file
        from stabletrain.tracking.store import open_client
        from stabletrain.tracking.store_errors import translate_errors

        assert self._opened is not None
        uri, run_id = self._opened
        try:
            with translate_errors(uri):
                check_file(uri, timeout=5.0)
                action(open_client(uri), run_id)
        except Exception as error:
            _logger.warning("the sweep's run in MLflow lacks %s: %s", what, error)

    def _objective(self, job: SweepJob) -> str | None:
        """The objective of a job's recipe, which the first job with a result decides: one chart, not several."""
        if job.recipe not in self._objectives and job.result is not None and not job.failed:
            wanted = self._wanted or job.objective
            found = objective_of(job.result.metrics, wanted)
            if found is not None:
                self._objectives[job.recipe] = found
            elif wanted is not None:
                known = ", ".join(sorted(job.result.metrics)) or "none"
                hint = did_you_mean(wanted, job.result.metrics)
                _logger.warning("objective: job %d has no metric %s; it has: %s%s", job.number, wanted, known, hint)
        return self._objectives.get(job.recipe)

    def _value(self, job: SweepJob) -> float:
        objective = self._objective(job)
        if objective is None or job.result is None or job.failed:
            return math.nan
        name = metric_names.find(objective, job.result.metrics)
        return math.nan if name is None else job.result.metrics[name]

    def _description(self) -> str:
        objectives = sorted(set(self._objectives.values()))
        values = [self._value(job) for job in self._jobs]
        rows = table(self._jobs, values, ", ".join(objectives) or "loss", TABLE)
        left = self._count - len(self._jobs)
        not_started = [f"\n{left} runs were not started."] if left else []
        return "\n".join([head(self._command, self._count), *rows, *not_started])


def _log(client: Any, run_id: str, objective: str, points: Mapping[int, float]) -> None:
    from stabletrain.tracking.naming import safe_key

    key = safe_key(f"sweep/{objective}")
    for number, value in points.items():
        # as in all runs: MLflow would store an infinity as 1.8e308
        client.log_metric(run_id, key, value if math.isfinite(value) else math.nan, step=number)


def _write_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from stabletrain.tracking.runs import write_tags

    write_tags(client, run_id, tags)


def _write_table(client: Any, run_id: str, ids: Sequence[str]) -> None:
    from stabletrain.tracking.artifacts import write_artifact
    from stabletrain.tracking.comparison import compare

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / TABLE
        compare(client.tracking_uri, ids).to_pandas().to_csv(file, index_label="run_id")
        write_artifact(client, run_id, file)


def _write_page(client: Any, run_id: str, ids: Sequence[str], title: str) -> None:
    from stabletrain.launch.comparing import compare_recorded, write_comparison
    from stabletrain.launch.recorded_run import find_run
    from stabletrain.tracking.artifacts import write_artifact

    runs = [find_run(each, command="compare", uri=client.tracking_uri) for each in ids]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / PAGE
        write_comparison(file, compare_recorded(runs), title=title)
        write_artifact(client, run_id, file)


def _statuses(results: Sequence[Result]) -> set[str]:
    return {MLFLOW_STATUS[result.end] for result in results}
