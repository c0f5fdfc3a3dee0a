"""Compare runs: the parameters that differ, and the final metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from stabletrain.core import metric_names
from stabletrain.errors import UserError
from stabletrain.tracking.differences import differences, parameters
from stabletrain.tracking.store import ensure_store, open_client
from stabletrain.tracking.store_errors import translate_errors

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

_Row = TypeVar("_Row")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The name, status, parameters and metrics of one run.

    Args:
        measures: what is computed from the record of its steps, see `stabletrain.tracking.measures`.
        outcome: one word; empty if it was not asked for.
    """

    run_id: str
    name: str
    status: str
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    outcome: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A table with one column per run: the parameters that differ, then the final metrics.

    ``None`` means that a run has no such value, unlike NaN.
    """

    runs: tuple[RunSummary, ...]
    params: Mapping[str, tuple[str | None, ...]]
    metrics: Mapping[str, tuple[float | None, ...]]

    def table(self) -> list[list[str]]:
        """Return the rows as text, the header first; a missing value is ``-``."""
        rows = [["", *(run.name for run in self.runs)], ["status", *(run.status for run in self.runs)]]
        rows += [[key, *("-" if value is None else value for value in row)] for key, row in self.params.items()]
        rows += [[key, *(_number(value) for value in row)] for key, row in self.metrics.items()]
        return rows

    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame with one row per run, indexed by run id."""
        import pandas

        columns: dict[str, Sequence[Any]] = {
            "name": [run.name for run in self.runs],
            "status": [run.status for run in self.runs],
            **{f"params.{key}": row for key, row in self.params.items()},
            **{f"metrics.{key}": row for key, row in self.metrics.items()},
        }
        return pandas.DataFrame(columns, index=[run.run_id for run in self.runs])


def compare(
    uri: str,
    run_ids: Sequence[str] | None = None,
    *,
    experiment: str | None = None,
    metrics: Iterable[str] | None = None,
    params: Iterable[str] | None = None,
    limit: int = 50,
) -> Comparison:
    """Read runs from the store and compare them.

    Args:
        uri: MLflow tracking URI.
        run_ids: the runs, in the order of the columns; None: those of ``experiment``.
        experiment: all runs of this experiment, the newest first; None: those of ``run_ids``.
        metrics: names or patterns such as ``val/*``; None: all. A plugin's metric has its present name, also if a run
            has logged it under an earlier one; both names are accepted.
        params: names or patterns, also of equal parameters; None: those that differ, the chosen options first, without
            the arguments that only one of two options has.
        limit: the maximum number of runs read from an experiment.

    Raises:
        UserError: if neither or both of ``run_ids`` and ``experiment`` are given, or one does not exist.
        StoreError: if the store cannot be used.
    """
    if (run_ids is None) == (experiment is None):
        raise UserError("compare: expected either run_ids or experiment, got both or neither")
    ensure_store(uri)
    with translate_errors(uri):
        client = open_client(uri)
        found = _by_id(client, run_ids) if run_ids is not None else _by_experiment(client, str(experiment), limit)
    return side_by_side([_summary(run) for run in found], metrics=metrics, params=params)


def side_by_side(
    runs: Sequence[RunSummary], *, metrics: Iterable[str] | None = None, params: Iterable[str] | None = None
) -> Comparison:
    """Compare runs that were read before; needs no store.

    Args:
        runs: the columns.
        metrics: names or patterns; None: all.
        params: names or patterns, also of equal parameters; None: those that differ.

    >>> a = RunSummary(run_id="1", name="a", status="FINISHED", params={"lr": "0.1"}, metrics={"loss": 2.0})
    >>> b = RunSummary(run_id="2", name="b", status="FAILED", params={"lr": "0.3"})
    >>> side_by_side([a, b]).table()
    [['', 'a', 'b'], ['status', 'FINISHED', 'FAILED'], ['lr', '0.1', '0.3'], ['loss', '2', '-']]
    """
    if params is None:
        param_rows = differences([run.params for run in runs])
    else:
        every = {key: tuple(run.params.get(key) for run in runs) for key in _keys(run.params for run in runs)}
        param_rows = _matching(every, params)
    metric_rows = {key: tuple(run.metrics.get(key) for run in runs) for key in _keys(run.metrics for run in runs)}
    if metrics is not None:
        metric_rows = _matching(metric_rows, [_present(each, metric_rows) for each in metrics])
    return Comparison(runs=tuple(runs), params=param_rows, metrics=metric_rows)


def comparison_url(server: str, run_ids: Sequence[str], experiment_ids: Sequence[str]) -> str:
    """Return the URL of MLflow's page that compares runs.

    Args:
        server: URL of a running ``mlflow ui``.
        run_ids: the runs.
        experiment_ids: ids (not names) of their experiments.

    >>> comparison_url("http://127.0.0.1:5000/", ["a", "b"], ["1"])
    'http://127.0.0.1:5000/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%221%22%5D'
    """
    lists = [quote(json.dumps(list(items), separators=(",", ":"))) for items in (run_ids, experiment_ids)]
    return f"{server.rstrip('/')}/#/compare-runs?runs={lists[0]}&experiments={lists[1]}"


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({key for mapping in mappings for key in mapping})


def _matching(rows: Mapping[str, _Row], patterns: Iterable[str]) -> dict[str, _Row]:
    return {key: rows[key] for pattern in patterns for key in rows if fnmatchcase(key, pattern)}


def _present(pattern: str, rows: Mapping[str, Any]) -> str:
    """A pattern for metrics; one that matches none of them because it is an old name is replaced by the present one."""
    if any(fnmatchcase(key, pattern) for key in rows):
        return pattern
    return metric_names.find(pattern, rows) or metric_names.new_name(pattern)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "nan" if math.isnan(value) else f"{value:.6g}"


def _summary(run: Any) -> RunSummary:
    return RunSummary(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id[:8],
        status=run.info.status,
        params=parameters(run.data.params, run.data.tags),
        metrics=metric_names.renamed(run.data.metrics, of_recipe=_is_of_recipe(run.data.params)),
        tags=dict(run.data.tags),
    )


def _is_of_recipe(params: Mapping[str, str]) -> bool:
    return params.get("model._target_", "").startswith("stabletrain.workloads.")


def _by_id(client: Any, run_ids: Sequence[str]) -> list[Any]:
    from mlflow.exceptions import MlflowException

    found = []
    for run_id in run_ids:
        try:
            found.append(client.get_run(run_id))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(f"compare: there is no run {run_id!r} in {client.tracking_uri}; correct its id") from None
    return found


def _by_experiment(client: Any, name: str, limit: int) -> list[Any]:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(sorted(item.name for item in client.search_experiments()))
        raise UserError(
            f"compare: there is no experiment {name!r} in {client.tracking_uri}; choose one of: {known or 'none'}"
        )
    return list(client.search_runs([experiment.experiment_id], max_results=limit))
