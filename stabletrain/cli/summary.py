"""The lines that are printed before and after a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stabletrain.launch.launcher import FinishedJob, Reporter
from stabletrain.launch.mlflow_run import is_tracked
from stabletrain.launch.result import Result
from stabletrain.runtime.records.run_files import CHECKPOINTS, EVENTS, WORKER_LOG, slurm_output

_HEADLINE = {
    "val/loss": "val/loss",
    "val/accuracy": "val/accuracy",
    "train/loss": "train/loss",
    "stability/loss": "loss",
    "stability/grad_norm": "grad_norm",
    "stability/clipped_share": "clipped",
    "stability/skipped": "skipped",
}
"""Metrics to print, and the words to print for them."""


class PrintingReporter(Reporter):
    """Prints a line when a run starts."""

    def starting(self, config: dict[str, Any], number: int | None) -> None:
        """Print the recipe, the seed and the folder of a run that starts.

        Args:
            config: the content of run.yaml.
            number: of the job in a sweep; None outside a sweep.
        """
        job = "" if number is None else f"job {number}: "
        print(f"{job}{config['recipe']}, seed {config['seed']}, in {config['run_dir']}", flush=True)

    def not_started(self, error: Exception, number: int | None) -> None:
        """Print why a job of a sweep cannot be started.

        Args:
            error: the reason.
            number: of the job.
        """
        print(f"job {number} cannot be started, the sweep goes on: {error}", file=sys.stderr, flush=True)


def summarize(jobs: Sequence[FinishedJob]) -> str:
    """Return the text that is printed at the end: how each job ended, where its files are, and commands to run next.

    Args:
        jobs: the jobs that ran, at least one.
    """
    lines: list[str] = []
    for job in jobs:
        lines += ["", *_describe(job)]
        if job.warning:
            lines.append(f"warning: {job.warning}")
    last = jobs[-1]
    if is_tracked(last.config):
        uri = last.config["logger"]["tracking_uri"]
        lines += ["", f"MLflow:      {shlex.join(['mlflow', 'ui', '--backend-store-uri', uri])}"]
    first, second = next_commands(last)
    lines += [f"next:        {first}", f"             {second}"]
    return "\n".join(lines)


def exit_code(jobs: Sequence[FinishedJob]) -> int:
    """Return the exit code of the first job that did not finish; 0 if all did.

    Args:
        jobs: the jobs that ran.
    """
    codes = [job.result.exit_code for job in jobs if job.result is not None]
    return next((code for code in codes if code), 0)


def _describe(job: FinishedJob) -> Iterator[str]:
    name = shlex.join([job.recipe, *job.overrides])
    if job.result is None:
        yield f"{name}: submitted to SLURM as job {job.slurm_job}; its output goes to {job.config['run_dir']}"
        return
    result = job.result
    length = f" after {result.steps} steps, {result.seconds:.0f} s" if result.seconds else ""
    yield f"{name}: {result.end}{length}"
    if result.end != "finished":
        yield f"  {result.message}"
    metrics = _headline(result)
    if metrics:
        yield f"  {metrics}"
    yield f"  folder: {job.config['run_dir']}"
    if result.checkpoint:
        yield f"  checkpoint: {result.checkpoint}"


def _headline(result: Result) -> str:
    names = [name for name in _HEADLINE if name in result.metrics] or sorted(result.metrics)[:5]
    return "  ".join(f"{_HEADLINE.get(name, name)} {result.metrics[name]:.4g}" for name in names)


def next_commands(job: FinishedJob) -> tuple[str, str]:
    """Return the two commands that are most useful after a run.

    Args:
        job: the run.
    """
    overrides = [word for word in job.overrides if not word.startswith(("resume=", "run_dir="))]
    trust = [f"--trust={package}" for package in job.config["trust"]]
    train = ["stabletrain", "train", job.recipe, *trust, *overrides]
    folder = Path(job.config["run_dir"])
    resume = [*train, f"resume={job.result.checkpoint if job.result else folder}"]
    has_checkpoint = job.result is not None and job.result.checkpoint is not None
    if job.result is None:
        return shlex.join(["squeue", "--jobs", str(job.slurm_job)]), shlex.join(
            ["tail", "-f", str(folder / slurm_output(str(job.slurm_job)))]
        )
    if job.result.end == "finished":
        seeds = [word for word in train if not word.startswith("seed=")]
        clips = [word for word in train if not word.startswith("plugins/clip=")]
        return shlex.join([*seeds, "-m", "seed=1,2,3"]), shlex.join([*clips, "-m", "plugins/clip=none,zscore"])
    if job.result.end in ("interrupted", "terminated", "killed") and has_checkpoint:
        return shlex.join(resume), shlex.join(["ls", str(folder / CHECKPOINTS)])
    if job.result.end == "stopped":
        lr = (job.config.get("optimizer") or {}).get("lr")
        retry = [*train, f"optimizer.lr={lr / 3:.3g}"] if isinstance(lr, float | int) else resume
        return shlex.join(["tail", str(folder / EVENTS)]), shlex.join(retry)
    read_log = shlex.join(["less", str(folder / WORKER_LOG)])
    return read_log, shlex.join(resume if has_checkpoint else ["stabletrain", "validate", *train[2:]])
