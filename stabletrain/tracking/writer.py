"""Write metrics to the store from one thread with a queue, in large batches; rejected ones go to a file."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from stabletrain.core.metric_names import NONFINITE
from stabletrain.runtime.records.json_lines import append_lines
from stabletrain.tracking.naming import safe_key
from stabletrain.tracking.store_errors import StoreError, first_line

log = logging.getLogger(__name__)

BATCH = 1000  # MLflow's limit for one log_batch

_SLOW = 2.0
"""An attempt that fails after so many seconds has waited for the store itself, and is not repeated at once."""

_LONGEST_PAUSE = 30.0
"""Maximum time in seconds without an attempt while the store fails."""


class Point(NamedTuple):
    """One value of one metric, in the form MLflow stores."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int


class _Entry(NamedTuple):
    metrics: Mapping[str, float]
    timestamp: int
    step: int


class _Signal(threading.Event):
    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.last = last


class MetricWriter:
    """Queues metrics within microseconds and writes them from a thread, in order, in batches of up to 1000.

    A failing store raises nothing in the caller: a batch is sent again after each of ``delays``, then appended to
    ``unsent``, and one warning is logged. Until the store works again, later batches are sent once each, and not at all
    for as long as the last attempt took, so that a store which lets its callers wait is waited for half of the time at
    most. That it works again is logged too; of stores that fail again and again, the 1st, 2nd, 4th, 8th ... time.

    NaN and infinities are written as NaN (MLflow would store an infinity as 1.8e308, which ruins every plot), and a
    metric ``stability_nonfinite/<name>`` counts them.

    Args:
        send: writes a batch of points, or raises.
        unsent: file for batches that could not be written, one JSON object per line.
        run_id: written into that file.
        nonfinite: counts so far by metric key, of a run that is resumed.
        logged: last steps so far by metric key, of a run that makes steps again: values up to there are left out.
        linger: seconds that a metric may wait for others, to be sent with them.
        delays: seconds before each further attempt.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Point]], None],
        unsent: Path,
        run_id: str,
        *,
        nonfinite: Mapping[str, int] | None = None,
        logged: Mapping[str, int] | None = None,
        linger: float = 0.5,
        delays: Sequence[float] = (0.1, 0.5, 2.0),
    ) -> None:
        self.pid = os.getpid()
        self.unsent = unsent
        self._send = send
        self._run_id = run_id
        self._nonfinite = dict(nonfinite or {})
        self._logged = dict(logged or {})
        self._linger = linger
        self._delays = tuple(delays)
        self._queue: SimpleQueue[_Entry | _Signal] = SimpleQueue()
        self._flush_now = threading.Event()
        self._giving_up = threading.Event()
        self._in_flight: Sequence[Point] = ()
        self._failures = self._losses = self._lost = 0
        self._failing = False
        self._not_before = 0.0
        self._file_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="stabletrain-metrics", daemon=True)
        self._thread.start()

    def put(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue the metrics of one step.

        Args:
            metrics: values by name; the caller must not change the mapping later.
            step: the step that they belong to.
        """
        self._queue.put(_Entry(metrics, time.time_ns() // 1_000_000, step))

    @property
    def failing(self) -> bool:
        """Whether the last batch was not accepted."""
        return self._failing

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until all metrics queued so far are in the store (or in the file); return False after the timeout.

        Args:
            timeout: seconds.
        """
        return self._signal(last=False, timeout=timeout)

    def close(self, timeout: float = 60.0) -> bool:
        """Flush and end the thread. Metrics that the store did not accept in time go to the file.

        Args:
            timeout: seconds.

        Returns:
            Whether the thread ended in time.
        """
        if self._signal(last=True, timeout=timeout):
            self._thread.join(timeout=5.0)
            return True
        self._giving_up.set()
        left, _, _ = self._drain()
        self._write_unsent([*self._in_flight, *left], TimeoutError(f"no answer within {timeout:g} s"))
        return False

    def _signal(self, *, last: bool, timeout: float) -> bool:
        if not self._thread.is_alive() or self.pid != os.getpid():
            return True
        signal = _Signal(last=last)
        self._queue.put(signal)
        self._flush_now.set()
        return signal.wait(timeout)

    def _run(self) -> None:
        ended = False
        while not ended:
            first = self._queue.get()
            self._flush_now.wait(self._linger)
            self._flush_now.clear()
            points, signals, ended = self._drain(first)
            for start in range(0, len(points), BATCH):
                self._in_flight = points[start:]
                if not self._giving_up.is_set():
                    self._deliver(points[start : start + BATCH])
            self._in_flight = ()
            for signal in signals:
                signal.set()

    def _drain(self, first: _Entry | _Signal | None = None) -> tuple[list[Point], list[_Signal], bool]:
        points: list[Point] = []
        signals: list[_Signal] = []
        item = first
        while True:
            if isinstance(item, _Signal):
                signals.append(item)
                if item.last:
                    return points, signals, True
            elif item is not None:
                self._expand(item, points)
            try:
                item = self._queue.get_nowait()
            except Empty:
                return points, signals, False

    def _expand(self, entry: _Entry, points: list[Point]) -> None:
        for name, value in entry.metrics.items():
            key = safe_key(name)
            if self._logged and entry.step <= self._logged.get(key, -1):
                continue
            if math.isfinite(value):
                points.append(Point(key, value, entry.timestamp, entry.step))
                continue
            count = self._nonfinite[key] = self._nonfinite.get(key, 0) + 1
            points.append(Point(key, math.nan, entry.timestamp, entry.step))
            points.append(Point(safe_key(f"{NONFINITE}{key}"), float(count), entry.timestamp, entry.step))

    def _deliver(self, points: Sequence[Point]) -> None:
        if self._failing and time.monotonic() < self._not_before:
            self._write_unsent(points)
            return
        waits: list[float | None] = [None] if self._failing else [*self._delays, None]
        for wait in waits:
            started = time.monotonic()
            try:
                self._send(points)
            except Exception as error:
                took = time.monotonic() - started
                if wait is not None and took < _SLOW and not self._giving_up.wait(wait):
                    continue
                self._not_before = time.monotonic() + min(took, _LONGEST_PAUSE)
                if not self._giving_up.is_set():
                    self._write_unsent(points, error)
            else:
                if self._failing:
                    self._failing = False
                    if _is_power_of_two(self._failures):
                        log.warning("MLflow accepts metrics again; those in %s are sent at the end", self.unsent)
            return

    def _write_unsent(self, points: Sequence[Point], error: Exception | None = None) -> None:
        """Write points to the file; ``error`` is why, None: it was said before."""
        if not points:
            return
        began = not self._failing
        self._failing = True
        self._failures += began
        lines = [json.dumps({"run_id": self._run_id, **point._asdict()}) + "\n" for point in points]
        try:
            with self._file_lock:
                self.unsent.parent.mkdir(parents=True, exist_ok=True)
                append_lines(self.unsent, "".join(lines))
        except OSError as second:
            self._lost += len(points)
            self._losses += 1
            if _is_power_of_two(self._losses):
                why = "fails" if error is None else first_line(error)
                log.error("%d metrics of run %s are lost: MLflow: %s; file: %s", self._lost, self._run_id, why, second)
            return
        if began and _is_power_of_two(self._failures):
            log.warning(
                "MLflow does not accept metrics (%s). Training continues; the metrics wait in %s and are sent at the "
                "end of the run, or later with stabletrain.tracking.upload_unsent(uri, path).",
                _describe(error),
                self.unsent,
            )


def _describe(error: Exception | None) -> str:
    if error is None:
        return "it failed before"
    return first_line(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {first_line(error)}"


def _is_power_of_two(count: int) -> bool:
    return count & (count - 1) == 0
