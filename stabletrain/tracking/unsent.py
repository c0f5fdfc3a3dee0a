"""Read the file of metrics that a store did not accept, and send them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from stabletrain.runtime.records.json_lines import append_lines, read_lines
from stabletrain.tracking.naming import chunks, safe_key
from stabletrain.tracking.writer import BATCH, Point

log = logging.getLogger(__name__)


def send_unsent(client: Any, path: Path, *, run_id: str | None = None) -> int:
    """Send the metrics in a file, then delete it, except for those of other runs; return their number.

    Args:
        client: of MLflow.
        path: the file.
        run_id: send the metrics of this run only; None: of all runs that the file names.
    """
    from mlflow.entities import Metric

    by_run: dict[str, list[Point]] = {}
    of_others: list[str] = []  # of scripts that share a current folder, each line as it is
    left_out: list[int] = []
    last_is_cut = False
    for line in read_lines(path):
        point = None if line.record is None else _point(line.record)
        run = line.record.get("run_id") if line.record else None
        if point is not None and isinstance(run, str) and run_id in (None, run):
            by_run.setdefault(run, []).append(point)
        elif point is not None and isinstance(run, str):
            of_others.append(json.dumps(line.record) + "\n")
        else:
            left_out.append(line.number)
        last_is_cut = line.record is None
    if last_is_cut:
        left_out.pop()
    if left_out:
        log.warning(
            "%s: %d lines hold no metric and are left out, the first is line %d",
            path,
            len(left_out),
            left_out[0],
        )
    for run, points in by_run.items():
        for part in chunks(points, BATCH):
            client.log_batch(run, metrics=[Metric(*point) for point in part])
    if of_others:
        part_of_it = path.with_name(f"{path.name}.part")
        part_of_it.unlink(missing_ok=True)
        append_lines(part_of_it, "".join(of_others))
        part_of_it.replace(path)
    else:
        path.unlink()
    return sum(map(len, by_run.values()))


def _point(record: Mapping[str, Any]) -> Point | None:
    """The metric in a record; None if MLflow would not accept it, and with it the whole batch."""
    key, value, timestamp, step = (record.get(field) for field in Point._fields)
    if not isinstance(key, str) or safe_key(key) != key:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not _is_small_integer(timestamp) or not _is_small_integer(step):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return Point(key, number if math.isfinite(number) else math.nan, timestamp, step)


def _is_small_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62
