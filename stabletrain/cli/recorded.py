"""Read recorded losses and gradient norms: CSV files of several kinds, and runs in MLflow."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stabletrain.config.problems import suggestion
from stabletrain.core.metric_names import full_name
from stabletrain.errors import UserError

NAMES = {signal: (full_name(signal), signal) for signal in ("loss", "grad_norm")}
"""Signal -> names under which the loggers may have it, the most certain one first."""

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_LONG = {
    "run": ("run_id", "run id", "run_uuid", "run"),
    "key": ("key", "metric"),
    "step": ("step",),
    "value": ("value",),
}
"""Columns of MLflow's export, one row for each value: what they hold -> their names, in lower case."""


class Series(NamedTuple):
    """A recorded run.

    Args:
        pairs: loss and gradient norm of each step, in the order of the steps.
        note: what to know about them; empty if there is nothing.
    """

    pairs: list[tuple[float, float]]
    note: str = ""


def read(source: str, run: str | None = None) -> Series:
    """Read a recorded run.

    Args:
        source: a CSV file, or the id of a run in MLflow. A file has a column for each signal (CSVLogger; a row may have
            empty cells, rows of one ``step`` belong together), or a row for each value (MLflow: run, key, step, value).
        run: id or name of the run in a file with several.

    Raises:
        UserError: if it cannot be read, or has no such values; the message names the file and the line.
    """
    if _RUN_ID.fullmatch(source) and not Path(source).exists():
        return _of_steps(_mlflow_run(source), source)
    file = Path(source)
    try:
        if file.exists() and not file.is_file():  # a named pipe or a device has no end
            raise UserError(f"replay: expected a CSV file, got {file}, which is none; name a file")
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            columns = rows.fieldnames or ()
            long = _long_columns(columns)
            if long is not None:
                return _of_steps(_long_rows(rows, long, file, run), source)
            if run is not None:
                raise UserError(f"replay: --run {run}: {file} has no column of runs; leave --run out")
            return _wide_rows(rows, columns, file)
    except (OSError, ValueError, csv.Error) as error:  # ValueError: no UTF-8, or a null character in the name
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"replay: {file} cannot be read ({error}); expected a CSV file, or the id of a run in MLflow"
        ) from None


def _wide_rows(rows: csv.DictReader[str], columns: Sequence[str], file: Path) -> Series:
    found = {signal: next((name for name in names if name in columns), None) for signal, names in NAMES.items()}
    missing = [signal for signal, name in found.items() if name is None]
    if missing:
        raise UserError(
            f"replay: {file} lacks the column {' and '.join(missing)}; expected {', '.join(NAMES)}, "
            f"got {', '.join(columns) or 'an empty file'}"
        )
    steps: list[tuple[int, dict[str, float]]] = []
    last: dict[int, dict[str, float]] = {}
    for number, row in enumerate(rows):
        cells = {signal: row[name] for signal, name in found.items() if name is not None}
        step = _step(row["step"], file, rows.line_num) if _filled(row.get("step")) else None
        is_cut = None in cells.values() or (step is None and len(set(map(_filled, cells.values()))) > 1)
        if is_cut:
            raise _wrong(file, rows.line_num, cells)
        values = {
            signal: _number(signal, text, file, rows.line_num, cells) for signal, text in cells.items() if _filled(text)
        }
        key = number if step is None else step
        if key in last and values.keys().isdisjoint(last[key]):  # another row of the same step
            last[key].update(values)
        elif values:  # steps may begin anew, such as in each epoch
            last[key] = values
            steps.append((key, values))
    return _of_steps(steps, str(file))


def _long_columns(columns: Sequence[str]) -> dict[str, str] | None:
    """The columns of MLflow's export by what they hold; None if it is no such file. There may be none of runs."""
    lower = {column.strip().lower(): column for column in columns}
    found = {kind: next((lower[name] for name in names if name in lower), "") for kind, names in _LONG.items()}
    return found if all(found[kind] for kind in ("key", "step", "value")) else None


def _long_rows(
    rows: csv.DictReader[str], columns: Mapping[str, str], file: Path, wanted: str | None
) -> list[tuple[int, dict[str, float]]]:
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        run = (row.get(columns["run"]) or "") if columns["run"] else ""
        key, cells = row[columns["key"]], {"value": row[columns["value"]]}
        of_run = values.setdefault(run, {})
        signal = next((signal for signal, names in NAMES.items() if key in names), None)
        if signal is not None:
            number = _number(signal, cells["value"], file, rows.line_num, cells)
            of_run.setdefault(str(key), {})[_step(row[columns["step"]], file, rows.line_num)] = number
    runs = sorted(values)
    if wanted is None and len(runs) > 1:
        raise UserError(f"replay: {file} has {len(runs)} runs; choose one with --run: {', '.join(runs[:10])}")
    if wanted is not None and wanted not in values:
        raise UserError(f"replay: {file} has no run {wanted!r}{suggestion(wanted, runs)}")
    return _merged(values[wanted if wanted is not None else runs[0]] if runs else {}, str(file))


def _mlflow_run(run_id: str) -> list[tuple[int, dict[str, float]]]:
    from stabletrain.tracking.store import default_tracking_uri, ensure_store, open_client
    from stabletrain.tracking.store_errors import translate_errors

    uri = default_tracking_uri()
    ensure_store(uri)
    with translate_errors(uri):
        from mlflow.exceptions import MlflowException

        client = open_client(uri)
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(
                f"replay: there is no file and no run {run_id} in {uri}; correct the id, or set MLFLOW_TRACKING_URI"
            ) from None
        names = [name for names in NAMES.values() for name in names if name in run.data.metrics]
        histories = {name: client.get_metric_history(run_id, name) for name in names}
    values = {name: {point.step: point.value for point in history} for name, history in histories.items()}
    return _merged(values, f"run {run_id}", list(run.data.metrics))


def _merged(
    values: Mapping[str, Mapping[int, float]], source: str, known: Sequence[str] = ()
) -> list[tuple[int, dict[str, float]]]:
    """The steps in order; a step that was logged again, after a restart, has the last value."""
    by_step: dict[int, dict[str, float]] = {}
    for signal, names in NAMES.items():
        name = next((name for name in names if name in values), None)
        if name is None:
            got = ", ".join(sorted(known)[:20] or values) or "none of them"
            raise UserError(f"replay: {source} lacks the metric {signal}; expected {', '.join(NAMES)}, got {got}")
        for step, value in values[name].items():
            by_step.setdefault(step, {})[signal] = value
    return sorted(by_step.items())


def _of_steps(recorded: Sequence[tuple[int, Mapping[str, float]]], source: str) -> Series:
    complete = [(step, values) for step, values in recorded if len(values) == len(NAMES)]
    if not complete:
        raise UserError(
            f"replay: expected one row for each attempted step, got {source} with no rows that have both "
            f"{' and '.join(NAMES)}"
        )
    pairs = [(values["loss"], values["grad_norm"]) for _, values in complete]
    notes = []
    incomplete = len(recorded) - len(complete)
    if incomplete:
        notes.append(f"{incomplete} steps have only one of {' and '.join(NAMES)} and are left out")
    gaps = sorted(after - before for (before, _), (after, _) in itertools.pairwise(complete))
    if gaps and gaps[len(gaps) // 2] > 1:
        notes.append(
            f"one value for every {gaps[len(gaps) // 2]} steps, of which it may be the mean; rules see single steps "
            "(Trainer(log_every_n_steps=1) records them)"
        )
    return Series(pairs, "; ".join(notes))


def _filled(text: str | None) -> bool:
    return text is not None and text.strip() != ""


def _step(text: str | None, file: Path, line: int) -> int:
    try:
        return int(float(text or ""))
    except (ValueError, OverflowError):
        raise UserError(f"replay: {file}, line {line}: expected a whole number as step, got {text!r}") from None


def _number(signal: str, text: str | None, file: Path, line: int, cells: Mapping[str, str | None]) -> float:
    try:
        value = float(text or "")
    except ValueError:
        raise _wrong(file, line, cells) from None
    if signal == "grad_norm" and not (value >= 0 or math.isnan(value)):
        raise _wrong(file, line, cells)
    return value


def _wrong(file: Path, line: int, cells: Mapping[str, str | None]) -> UserError:
    values = ", ".join(f"{name}={text!r}" for name, text in cells.items())
    return UserError(f"replay: {file}, line {line}: expected two numbers, grad_norm >= 0, got {values}")
