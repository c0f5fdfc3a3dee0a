"""The end of one process of a run: what the user sees of it, and what it writes for the launcher before it leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.config.resume import checkpoint_of_run
from stabletrain.core.metric_names import without_old_names
from stabletrain.launch.bounded import one_message
from stabletrain.launch.cause import Cause, cause_of, traceback_text
from stabletrain.launch.rank_ends import (
    SPARE_ENV,
    RankEnd,
    is_one_of_several,
    read_ends,
    remove_own_end,
    this_rank,
    write_end,
)
from stabletrain.launch.result import Result
from stabletrain.runtime.records.run_files import ENDS, RESULT
from stabletrain.runtime.signal_watch import SignalWatch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger("stabletrain")
_log_file_only = logging.getLogger("worker")
"""Its records go to the log file, and not to the terminal."""

_ORDERLY = ("finished", "interrupted", "terminated")
"""Ends at which a process has things to save, and leaves when it is done."""
_LEAVE_WITHIN = 20.0
"""Seconds after which a process that has failed is ended, if it still tears down, or waits for its threads or its
process group."""


class WorkerEnd:
    """How one process of a run ends.

    Args:
        folder: the run's folder.
        watch: the handler of the process's signals.
    """

    def __init__(self, folder: Path, watch: SignalWatch) -> None:
        self.folder = folder
        self.rank = this_rank()
        self._watch = watch
        self._started_at = time.monotonic()
        self._cause: Cause | None = None
        self._is_consequence = False
        self._time_ns = 0
        self._at = ""
        self._leaving: threading.Timer | None = None
        watch.must_not_wait = self._another_has_failed
        remove_own_end(folder, self.rank)

    def note(self, error: BaseException, *, started: bool, at: str = "") -> Cause:
        """Write at once why this process ends. The first exception counts: later ones come from tearing down.

        Args:
            error: that ended the training.
            started: whether the first training batch has begun.
            at: where in the training, such as ``step 12``; empty if that is unknown.
        """
        if self._cause is None:
            self._time_ns = time.time_ns()
            cause = self._cause = cause_of(error, started=started)
            self._at = at
            unsure = cause.lost == "perhaps" or (cause.result.end in ("interrupted", "terminated") and not cause.agreed)
            self._is_consequence = self._another_has_failed() if unsure else cause.lost_peer
            if is_one_of_several():
                with contextlib.suppress(OSError):  # it is written again at the end
                    write_end(self._end(cause.result), self.folder)
                if cause.result.end in ("failed", "refused") and not cause.agreed:  # its teardown may wait for others
                    self._leaving = _leave_within(_LEAVE_WITHIN, cause.result.exit_code)
        return self._cause

    def show(self, error: BaseException, *, started: bool) -> Result:
        """Show the user why this process ends, unless another process has shown it; return the end.

        Args:
            error: that ended the training.
            started: whether the first training batch has begun.
        """
        cause = self.note(error, started=started)
        if cause.show == "nothing":
            return cause.result
        text = traceback_text(error)
        if self._is_consequence and is_one_of_several():
            _log_file_only.error("rank %d: %s", self.rank, text)
            return cause.result
        mine = self._is_first_to_show()
        if cause.show == "traceback":
            (logger if mine else _log_file_only).error("%s", text)
            return cause.result
        _log_file_only.info("%s", text)
        prefix = "" if cause.result.end == "stopped" else "error: "
        (logger if mine else _log_file_only).error("%s%s", prefix, cause.result.message)
        return cause.result

    def hand_over(self, result: Result, trainer: Trainer | None) -> Result:
        """Write how this process ended: result.json on rank 0, and a file for the launcher on every rank.

        From now on signals are ignored. A run's folder that cannot be written is one line, not an error.

        Args:
            result: the end and its message.
            trainer: of the run; None if the run ended before there was one.

        Returns:
            The complete result.
        """
        self._watch.ignore()
        result = self._complete(result, trainer)
        problems: list[str] = []
        if trainer is None or trainer.is_global_zero:
            with _noting(problems):
                result.write(self.folder)
        with _noting(problems):
            write_end(self._end(result), self.folder)
        launcher_knows = bool(os.environ.get(SPARE_ENV)) and len(problems) < 2
        if problems and not launcher_knows:
            logger.warning("%s cannot be written to %s: %s", RESULT, self.folder, problems[0])
            logger.warning("the run has ended after %d steps: %s: %s", result.steps, result.end, result.message)
        if result.end not in _ORDERLY and is_one_of_several():
            if self._leaving is not None:  # the teardown has come to its end, and what follows gets the time anew
                self._leaving.cancel()
            self._leaving = _leave_within(_LEAVE_WITHIN, result.exit_code)
        return result

    def _complete(self, result: Result, trainer: Trainer | None) -> Result:
        steps, metrics, threads = 0, {}, None
        if trainer is not None:
            with contextlib.suppress(Exception):  # of a Trainer that is built in part
                steps = int(trainer.global_step)
            with contextlib.suppress(Exception):
                metrics = numbers_of(without_old_names(trainer.callback_metrics))
        if "torch" in sys.modules:
            with contextlib.suppress(Exception):  # an import of torch that was cut short
                threads = sys.modules["torch"].get_num_threads()
        checkpoint = result.checkpoint
        if checkpoint is None:
            with contextlib.suppress(Exception):
                checkpoint = newest_checkpoint(self.folder)
        seconds = round(time.monotonic() - self._started_at, 3)
        return replace(result, steps=steps, seconds=seconds, metrics=metrics, checkpoint=checkpoint, threads=threads)

    def _end(self, result: Result) -> RankEnd:
        cause = self._cause
        return RankEnd(
            rank=self.rank,
            result=result,
            consequence=self._is_consequence and is_one_of_several(),
            agreed=cause is not None and cause.agreed,
            lost=cause.lost if cause is not None else "",
            at=self._at,
            place=one_message(cause.place, 500) if cause is not None else "",
            time_ns=self._time_ns or time.time_ns(),
        )

    def _another_has_failed(self) -> bool:
        if not is_one_of_several():
            return False
        mistakes = ("failed", "refused")
        return any(end.rank != self.rank and end.result.end in mistakes for end in read_ends(self.folder))

    def _is_first_to_show(self) -> bool:
        """Whether this is the first process that has something to show; the others have it in the log only."""
        if not is_one_of_several():
            return True
        attempt = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("SLURM_RESTART_COUNT", "")
        try:
            with (self.folder / ENDS / f"shown{attempt}").open("x"):
                return True
        except FileExistsError:
            return False
        except OSError:
            return True


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers, by name; others are left out.

    Args:
        metrics: any values by name.
    """
    found = {}
    for name in sorted(map(str, metrics)):
        with contextlib.suppress(Exception):  # whatever float() calls
            found[name] = float(metrics[name])
    return found


def newest_checkpoint(folder: Path) -> str | None:
    """Return the path of the newest complete checkpoint of a run; None if there is none.

    Args:
        folder: the run's folder.
    """
    from stabletrain.runtime.checkpoints.loading import newest

    found = newest(folder) or checkpoint_of_run(folder)
    return str(found) if found else None


@contextlib.contextmanager
def _noting(problems: list[str]) -> Any:
    try:
        yield
    except Exception as error:  # whatever fails here must not hide how the run ended
        problems.append(one_message(str(getattr(error, "strerror", None) or error)))


def _leave_within(seconds: float, code: int) -> threading.Timer:
    """End this process after some seconds, whatever it still waits for: the other ranks wait for it to leave."""
    timer = threading.Timer(seconds, lambda: os._exit(code))
    timer.daemon = True
    timer.start()
    return timer
