"""``python -m stabletrain.launch.batch_job run.yaml``: the main process of a SLURM job, which starts the workers.

Attempts within the allocation are those of the launcher's loop: one record, one budget, one report. A job that SLURM
starts again, after a preemption or the failure of a node, goes on with the next attempt.

SLURM signals the workers itself, and they save and end; this process only waits for them. What it does then depends on
why the job ends, which SLURM tells.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from stabletrain.errors import UserError
from stabletrain.launch import mlflow_run
from stabletrain.launch.attempt_end import AttemptEnd, Begun, conclude, end_attempt, failed_start
from stabletrain.launch.attempts import ATTEMPT_ENV, read_attempts
from stabletrain.launch.bounded import is_count, read_json
from stabletrain.launch.process import PATHS_OUTSIDE, PYTHON, ProcessEnd
from stabletrain.launch.rank_ends import remove_ends
from stabletrain.launch.result import Result
from stabletrain.launch.run_attempts import restart_text
from stabletrain.launch.run_folder import read_run_yaml
from stabletrain.runtime.records.run_files import SLURM_ATTEMPT

_ASK_WITHIN = 20.0
"""Seconds that SLURM gets to answer."""


class _SlurmJob:
    """What SLURM says about this job."""

    def __init__(self) -> None:
        self.number = os.environ.get("SLURM_JOB_ID", "")
        count = os.environ.get("SLURM_RESTART_COUNT", "")
        self.restarts = int(count) if count.isdecimal() else 0
        """How often SLURM has started the job again."""

    def state(self) -> Literal["running", "requeued", "ending", "unknown"]:
        """Return whether the job goes on, is about to be started again, or ends for good."""
        answer = self._ask("show", "job", "-o", self.number)
        known = dict(word.split("=", 1) for word in answer.split() if "=" in word)
        if "JobState" not in known:
            return "unknown"
        if known.get("Restarts", "").isdecimal() and int(known["Restarts"]) > self.restarts:
            return "requeued"
        return "running" if known["JobState"] == "RUNNING" else "ending"

    def requeue(self) -> str:
        """Put the job back into the queue, which ends this process; return why that failed, or nothing."""
        return self._ask("requeue", self.number)

    def _ask(self, *words: str) -> str:
        try:
            done = subprocess.run(
                ["scontrol", *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_ASK_WITHIN,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return done.stdout.strip()


class _Batch:
    """The attempts of a run within one job."""

    def __init__(self, config: dict[str, Any], run_yaml: Path) -> None:
        self._config, self._run_yaml = config, run_yaml
        self._folder = Path(config["run_dir"])
        self._marker = self._folder / SLURM_ATTEMPT
        self._job = _SlurmJob()
        self._signum: int | None = None
        signal.signal(signal.SIGTERM, self._note)

    def run(self) -> int:
        """Run attempts until one of them ends the run, or the job; return the exit code."""
        self._record_lost_attempt()
        attempts = read_attempts(self._folder)
        number = max(attempts[-1].attempt if attempts else 0, self._job.restarts) + 1
        while True:
            last = self._attempt(number)
            if last.report is not None:
                _say(last.report.shown())
            # a preempted job may have lost a process to the signal before the others have saved
            if not last.restart or self._signum is not None or self._job.state() in ("requeued", "ending"):
                break
            _say(restart_text(last))
            number += 1
        return self._finish(last.result)

    def _attempt(self, number: int) -> AttemptEnd:
        begun = Begun.now(number, self._folder)
        remove_ends(self._folder)
        self._mark(begun)
        worker = [*PYTHON, "-m", "stabletrain.worker", str(self._run_yaml), PATHS_OUTSIDE]
        environment = {**os.environ, ATTEMPT_ENV: str(number)}
        try:
            process = subprocess.Popen(["srun", "--kill-on-bad-exit=1", *worker], env=environment)
        except OSError as error:
            reason = f"srun cannot be started ({error.strerror or error}): the job needs SLURM's commands in its PATH"
            result = Result(end="failed", message=reason)
            last = conclude(self._config, failed_start(begun, result, self._folder), result, may_restart=False)
        else:
            with process:
                # while the workers import; a job that is preempted has little time for imports
                mlflow_run.import_for_end(self._config)
                if number > 1:
                    mlflow_run.continue_run(self._config, number)
                code = process.wait()
            ended = ProcessEnd(code=code if code >= 0 else 128 - code, signum=self._signum)
            last = end_attempt(self._config, ended, begun)
        with suppress(OSError):
            self._marker.unlink()
        return last

    def _finish(self, result: Result) -> int:
        """Set the run's status; put the job back into the queue, if that is wanted."""
        may_go_on = result.end in ("terminated", "killed", "failed", "interrupted")
        state = self._job.state() if may_go_on else "unknown"
        if state == "requeued":
            _say(f"SLURM starts this job again ({result.message}); the run goes on then")
            mlflow_run.suspend_run(self._config)
            return result.exit_code
        if state == "running" and result.end == "terminated" and self._config["launch"].get("requeue"):
            _say(f"the job is put back into the queue (launch.requeue): {result.message}")
            mlflow_run.suspend_run(self._config)
            failure = self._job.requeue()
            if not failure:
                return result.exit_code
            _say(f"error: the job could not be put back into the queue: {failure}")
        problem = mlflow_run.finish_run(self._config, result)
        if problem:
            _say(f"error: {problem}")
        _say(f"{result.end}: {result.message}")
        return result.exit_code

    def _mark(self, begun: Begun) -> None:
        with suppress(OSError):
            self._marker.write_text(json.dumps({"attempt": begun.number, "start_ns": begun.start_ns}))

    def _record_lost_attempt(self) -> None:
        """Record an attempt whose end nobody could record: its node failed, or had no time to end in order."""
        with suppress(OSError, ValueError):
            content = read_json(self._marker)
            self._marker.unlink()
            if isinstance(content, Mapping) and is_count(content.get("attempt")) and is_count(content.get("start_ns")):
                begun = Begun(number=content["attempt"], start_ns=content["start_ns"])
                message = "the job ended before anything could be recorded: its node failed, or it was killed"
                result = Result(end="terminated", message=message)
                conclude(self._config, failed_start(begun, result, self._folder), result, may_restart=False)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Run a job and return its exit code.

    Args:
        argv: path of run.yaml.
    """
    if len(argv) != 1:
        print("usage: python -m stabletrain.launch.batch_job run.yaml", file=sys.stderr)
        return 2
    try:
        config = read_run_yaml(Path(argv[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _Batch(config, Path(argv[0])).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
