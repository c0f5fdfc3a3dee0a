"""The lines that are printed before and after a run."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from stabletrain.launch.attempts import read_attempts
from stabletrain.launch.launcher import FinishedJob, Reporter
from stabletrain.launch.mlflow_run import is_tracked
from stabletrain.launch.other_nodes import has_other_nodes
from stabletrain.launch.result import Result
from stabletrain.runtime.records.json_lines import read_lines
from stabletrain.runtime.records.run_files import CHECKPOINTS, EVENTS, WORKER_LOG, crash_report, slurm_output

_logger = logging.getLogger("stabletrain")

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


def summarize(jobs: Sequence[FinishedJob], *, suggest: bool = True) -> str:
    """Return the text that is printed at the end: how each job ended, where its files are, and commands to run next.

    Args:
        jobs: the jobs that ran, at least one.
        suggest: whether to add the commands, which are those of ``stabletrain train``.
    """
    lines: list[str] = []
    for job in jobs:
        lines += ["", *_describe(job)]
        if job.warning:
            lines.append(f"warning: {job.warning}")
    last = jobs[-1]
    lines += _where_to_look(jobs)
    if suggest:
        first, second = next_commands(last) if len(jobs) == 1 else after_sweep(jobs)
        lines += [f"next:        {first}", f"             {second}"]
    return "\n".join(lines)


def _where_to_look(jobs: Sequence[FinishedJob]) -> list[str]:
    """Return how to see the runs in MLflow: the command, unless their store is a server, and the address."""
    tracked = [job.config for job in jobs if is_tracked(job.config) and job.config["logger"].get("run_id")]
    if not tracked:
        return []
    from stabletrain.tracking.addresses import local_server, server_of
    from stabletrain.tracking.latest import page_of_runs
    from stabletrain.tracking.store import default_tracking_uri

    uri = tracked[-1]["logger"]["tracking_uri"]
    server = server_of(uri)
    lines = []
    if server is None:
        lines.append(shlex.join(["stabletrain", "ui", *([] if uri == default_tracking_uri() else ["--uri", uri])]))
    ids = [config["logger"]["run_id"] for config in tracked if config["logger"]["tracking_uri"] == uri]
    with suppress(Exception):  # a store that fails now has been reported
        lines.append(page_of_runs(uri, server or local_server(), ids))
    return ["", *(f"{'MLflow:' if line is lines[0] else '':13}{line}" for line in lines)] if lines else []


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
    uri = (job.config.get("logger") or {}).get("tracking_uri")
    found = finding(Path(job.config["run_dir"]), uri if isinstance(uri, str) else None)
    if found:
        yield f"  {found}"
    if result.end != "refused":  # the folder, if there is one, is another run's
        yield f"  folder: {job.config['run_dir']}"
    if result.checkpoint:
        yield f"  checkpoint: {result.checkpoint}"


def finding(folder: Path, uri: str | None = None) -> str | None:
    """Return the one thing about a run that matters, if any; never an error, since the run has ended as it did.

    Args:
        folder: the run's folder.
        uri: tracking URI of its store; None: the default.
    """
    try:
        from stabletrain.launch.run_series import series_of_folder
        from stabletrain.tracking.findings import sentence

        found = sentence(series_of_folder(folder, uri))
    except Exception as error:
        _logger.debug("nothing is found in %s: %s: %s", folder, type(error).__name__, error)
        return None
    return None if found is None else f"{found} (stabletrain report {shlex.quote(str(folder))})"


def _headline(result: Result) -> str:
    names = [name for name in _HEADLINE if name in result.metrics] or sorted(result.metrics)[:5]
    return "  ".join(f"{_HEADLINE.get(name, name)} {result.metrics[name]:.4g}" for name in names)


def after_sweep(jobs: Sequence[FinishedJob]) -> tuple[str, str]:
    """Return the two commands that are most useful after a sweep.

    Args:
        jobs: that have run, at least two.
    """
    folders = [str(job.config["run_dir"]) for job in jobs if job.result is not None and job.result.steps]
    if len(folders) < 2:
        return next_commands(jobs[-1])
    compare = ["stabletrain", "compare", *folders]
    return shlex.join([*compare, "--html", "page.html"]), shlex.join(["stabletrain", "report", folders[-1]])


def next_commands(job: FinishedJob) -> tuple[str, str]:
    """Return the two commands that are most useful after a run.

    Args:
        job: the run.
    """
    overrides = [word for word in job.overrides if not word.startswith(("resume=", "run_dir="))]
    trust = [f"--trust={package}" for package in job.config["trust"]]
    train = ["stabletrain", "train", job.recipe, *trust, *overrides]
    folder = Path(job.config["run_dir"])
    has_checkpoint = job.result is not None and job.result.checkpoint is not None
    resume = [*train, f"resume={job.result.checkpoint}"] if job.result is not None and has_checkpoint else train
    if job.result is None:
        return shlex.join(["squeue", "--jobs", str(job.slurm_job)]), shlex.join(
            ["tail", "-f", str(folder / slurm_output(str(job.slurm_job)))]
        )
    if job.result.end == "finished" and has_other_nodes(job.config):  # a sweep is refused
        return shlex.join(["stabletrain", "report", str(folder)]), shlex.join(["ls", str(folder / CHECKPOINTS)])
    if job.result.end == "finished":
        seeds = [word for word in train if not word.startswith("seed=")]
        clips = [word for word in train if not word.startswith("plugins/clip=")]
        return shlex.join([*seeds, "-m", "seed=1,2,3"]), shlex.join([*clips, "-m", "plugins/clip=none,zscore"])
    if job.result.end in ("interrupted", "terminated", "killed") and has_checkpoint:
        return shlex.join(resume), shlex.join(["ls", str(folder / CHECKPOINTS)])
    if job.result.end == "stopped" and (report := _last_crash(folder)):
        return shlex.join(["less", str(report)]), shlex.join(resume)
    if job.result.end == "stopped":
        lr = (job.config.get("optimizer") or {}).get("lr")
        retry = resume
        if isinstance(lr, float | int) and not _ranks_differed(folder):
            retry = [*train, f"optimizer.lr={lr / 3:.3g}"]
        return shlex.join(["tail", str(folder / EVENTS)]), shlex.join(retry)
    read_log = shlex.join(["less", str(folder / WORKER_LOG)])
    return read_log, shlex.join(resume if has_checkpoint else ["stabletrain", "validate", *train[2:]])


def _ranks_differed(folder: Path) -> bool:
    """Whether copies of the weights have differed, which no learning rate mends."""
    with suppress(OSError):
        return any((line.record or {}).get("kind") == "replicas_differ" for line in read_lines(folder / EVENTS))
    return False


def _last_crash(folder: Path) -> Path | None:
    """What to read of a run that is not restarted any more: how its last attempt died. None if it did not die."""
    attempts = read_attempts(folder)
    if not attempts or attempts[-1].cause not in ("failed", "killed"):
        return None
    report = folder / crash_report(attempts[-1].attempt)
    return report if report.is_file() else folder / WORKER_LOG
