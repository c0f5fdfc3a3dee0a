"""Read recorded losses and gradient norms: CSV files of several kinds, and runs in their folders and in MLflow."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stabletrain.config.problems import suggestion
from stabletrain.core import metric_names
from stabletrain.core.metric_names import full_name
from stabletrain.errors import UserError
from stabletrain.launch.recorded_run import RecordedRun, find_run
from stabletrain.runtime.records.steps_file import Flag

NAMES = {signal: (full_name(signal), signal) for signal in ("loss", "grad_norm")}
"""Signal -> names under which the loggers may have it, the most certain one first."""

_FILES = (".csv", ".tsv", ".txt")
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
        source: a CSV file, or a run: its folder, its id, the beginning of an id, or its name. A file has a column for
            each signal (CSVLogger; a row may have empty cells, rows of one ``step`` belong together), or a row for each
            value (MLflow: run, key, step, value). Of a run, ``steps.bin`` is read, and sampled metrics if it has none.
        run: id or name of the run in a file with several.

    Raises:
        UserError: if it cannot be read, or has no such values; the message names the file and the line.
    """
    file = Path(source)
    if _is_run(file):
        return _of_run(find_run(source, command="replay", what="file and no run"))
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
            f"replay: {file} cannot be read ({error}); expected a CSV file, or a run: its folder, id or name"
        ) from None


def _is_run(source: Path) -> bool:
    """Whether a source is a run's folder, or may be its id or name, which can have dots: ``optimizer.lr=0.01``."""
    if source.is_dir():
        return True
    is_a_name = len(source.parts) == 1 and source.name.isprintable() and source.suffix.lower() not in _FILES
    return is_a_name and not source.exists()


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


def _of_run(run: RecordedRun) -> Series:
    """Every step that was recorded; for a run without such a record, the sampled metrics."""
    steps = run.steps()
    name = run.run_id or run.folder or run.name
    if steps is None or not len(steps.step) or not np.isfinite(steps.grad_norm).any():
        names = {logged: logged for signal in NAMES if (logged := metric_names.find(full_name(signal), run.metrics))}
        values = {logged: dict(run.history(logged)) for logged in names}
        return _of_steps(_merged(values, f"run {name}", list(run.metrics)), str(name))
    seen = (steps.flags & (Flag.OVERFLOW | Flag.NO_LOSS)) == 0
    if not seen.any():
        raise UserError(f"replay: expected steps with a loss, got run {name}, in which each overflowed or had none")
    left_out = int(len(seen) - seen.sum())
    pairs = list(zip(steps.loss[seen].tolist(), steps.grad_norm[seen].tolist(), strict=True))
    return Series(pairs, f"{left_out} steps that rules do not see are left out" if left_out else "")


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
