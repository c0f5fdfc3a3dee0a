"""The end of one attempt of a run: its cause, its line in ``attempts.jsonl``, a crash report, and whether to restart.

The launcher calls it after each attempt, and in a SLURM job the process that starts the workers.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stabletrain.config.restarts import allowed_restarts, progress_steps
from stabletrain.launch.attempts import Attempt, append_attempt, iso, read_attempts, seconds_of
from stabletrain.launch.began import Began, last_step_at, read_began, recorded_steps
from stabletrain.launch.crash_report import CrashReport
from stabletrain.launch.final_status import final_result, number_of_processes, waiting_limit
from stabletrain.launch.first_cause import blamed
from stabletrain.launch.process import ProcessEnd
from stabletrain.launch.rank_ends import RankEnd, read_ends, read_exit_codes
from stabletrain.launch.restart_budget import given_up, without_progress
from stabletrain.launch.result import Result

_logger = logging.getLogger("stabletrain")


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What is known of an attempt before it ends.

    Args:
        number: from 1.
        start_ns: when its processes were started, in nanoseconds since 1970.
        last_step_ns: when the last step of the attempt before was recorded; 0: there was none.
        ready_ns: when all processes had imported and built the run; 0: they had not.
    """

    number: int
    start_ns: int
    last_step_ns: int = 0
    ready_ns: int = 0

    @classmethod
    def now(cls, number: int, folder: Path) -> Begun:
        """Return that of an attempt which is about to start.

        Args:
            number: from 1.
            folder: the run's folder.
        """
        return cls(number=number, start_ns=time.time_ns(), last_step_ns=last_step_at(folder) if number > 1 else 0)


@dataclass(frozen=True, kw_only=True)
class AttemptEnd:
    """How an attempt ended, and what follows.

    Args:
        attempt: its line in ``attempts.jsonl``.
        result: of the run, as long as no other attempt follows; written to result.json.
        restart: whether another attempt follows.
        report: of several processes that failed; None for others.
        used: attempts that died without progress, this one counted.
        restarts: how many restarts without progress the run has.
    """

    attempt: Attempt
    result: Result
    restart: bool
    report: CrashReport | None = None
    used: int = 0
    restarts: int = 0


def end_attempt(config: Mapping[str, Any], ended: ProcessEnd, begun: Begun, spare: Path | None = None) -> AttemptEnd:
    """Determine how an attempt ended, record it, and decide whether another one follows.

    What cannot be written is a warning: the attempt has ended as it did.

    Args:
        config: the content of run.yaml.
        ended: how the worker, or the program that started the workers, ended.
        begun: of the attempt.
        spare: the second folder of the processes' ends; None if there is none.
    """
    folder = Path(config["run_dir"])
    result = final_result(config, ended, spare)
    ends, exits, size = read_ends(folder, spare), read_exit_codes(spare), number_of_processes(config)
    at_fault, end = blamed(ends, ended, size=size, exits=exits, timeout=waiting_limit(config))
    began = read_began(folder, begun.number, spare)
    attempt = _attempt(result, begun, began, folder, at_fault, end)
    report = None
    if size > 1 and result.end in ("failed", "killed") and ended.signum is None:
        report = CrashReport(
            folder=folder,
            attempt=begun.number,
            size=size,
            message=result.message,
            blamed=at_fault,
            ends=ends,
            exits=exits,
        )
    return conclude(config, attempt, result, _may_be_restarted(result, ended, attempt, end), report)


def conclude(
    config: Mapping[str, Any], attempt: Attempt, result: Result, may_restart: bool, report: CrashReport | None = None
) -> AttemptEnd:
    """Record an attempt, and decide whether another one follows.

    Args:
        config: the content of run.yaml.
        attempt: that has ended.
        result: how.
        may_restart: whether another attempt could end differently.
        report: of several processes that failed.
    """
    folder = Path(config["run_dir"])
    earlier = read_attempts(folder)
    restarts, _ = allowed_restarts(config)
    try:
        if restarts or number_of_processes(config) > 1 or attempt.attempt > 1:
            append_attempt(folder, attempt)
        if report is not None:
            report.write()
    except OSError as error:
        _logger.warning("%s cannot be written (%s)", error.filename or folder, error.strerror or error)
    attempts = [*earlier, attempt]
    used = len(without_progress(attempts, progress_steps(config)))
    restart = may_restart and 0 < used <= restarts
    if may_restart and restarts > 0 and not restart:
        last = f"and at {report.path}" if report is not None else "and at the log"
        gave_up = given_up(attempts, progress_steps(config), last)
        result = replace(result, end=gave_up.end, message=gave_up.message)
    if attempts[0].attempt < attempt.attempt and not restart:
        result = replace(result, seconds=_since(attempts))
    _rewrite(result, folder)
    return AttemptEnd(attempt=attempt, result=result, restart=restart, report=report, used=used, restarts=restarts)


def failed_start(begun: Begun, result: Result, folder: Path) -> Attempt:
    """Return the record of a further attempt whose processes did not come to train.

    Args:
        begun: of the attempt.
        result: how it ended.
        folder: the run's folder.
    """
    return _attempt(result, begun, None, folder, (), None)


def _attempt(
    result: Result, begun: Begun, began: Began | None, folder: Path, ranks: Sequence[int], end: RankEnd | None
) -> Attempt:
    lost = (began.time_ns - begun.last_step_ns) / 1e9 if began is not None and begun.last_step_ns else 0.0
    ranks = ranks if result.end in ("failed", "killed") else ()
    host = (end.host if end is not None else socket.gethostname()) if ranks else ""
    return Attempt(
        attempt=begun.number,
        start=iso(begun.start_ns),
        ready=iso(begun.ready_ns) if begun.ready_ns else None,
        first_step=iso(began.time_ns) if began is not None else None,
        end=iso(time.time_ns()),
        cause=result.end,
        message=result.message,
        ranks=tuple(ranks),
        host=host,
        step=max(recorded_steps(folder), result.steps),
        from_step=began.from_step if began is not None else None,
        steps_lost=began.steps_lost if began is not None else 0,
        seconds_lost=round(max(0.0, lost), 3),
    )


def _may_be_restarted(result: Result, ended: ProcessEnd, attempt: Attempt, end: RankEnd | None) -> bool:
    """Not: what the user or a plugin ended, what was refused, and a bug that shows before the run's first step."""
    if ended.signum is not None or result.end not in ("failed", "killed"):
        return False
    own_exception = result.end == "failed" and end is not None and not end.consequence
    return attempt.from_step is not None or attempt.attempt > 1 or not own_exception


def _since(attempts: Sequence[Attempt]) -> float:
    begin, end = (seconds_of(text) for text in (attempts[0].ready or attempts[0].start, attempts[-1].end))
    return round(max(0.0, end - begin), 3)


def _rewrite(result: Result, folder: Path) -> None:
    try:
        result.write(folder)
    except OSError as error:
        _logger.warning("result.json cannot be written to %s (%s)", folder, error.strerror or error)
