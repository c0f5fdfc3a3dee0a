"""What is printed before and after a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stabletrain.launch.launcher import Done, Reporter
from stabletrain.launch.mlflow_run import is_tracked
from stabletrain.launch.result import Result

_HEADLINE = ("val_loss", "val_accuracy", "train_loss", "loss", "grad_norm", "clipped", "skipped")


class Printer(Reporter):
    """Prints a line when a run starts."""

    def starting(self, config: dict[str, Any], number: int | None) -> None:
        """Say what starts, and where.

        Args:
            config: as in run.yaml.
            number: of the job in a sweep.
        """
        job = "" if number is None else f"job {number}: "
        print(f"{job}{config['recipe']}, seed {config['seed']}, in {config['run_dir']}", flush=True)


def after(done: Sequence[Done]) -> str:
    """Return what is printed at the end: what happened, where to look, and what to type next.

    Args:
        done: the jobs that ran.
    """
    lines: list[str] = []
    for job in done:
        lines += ["", *_what_happened(job)]
        if job.complaint:
            lines.append(f"warning: {job.complaint}")
    last = done[-1]
    if is_tracked(last.config):
        uri = last.config["logger"]["tracking_uri"]
        lines += ["", f"look at it:  {shlex.join(['mlflow', 'ui', '--backend-store-uri', uri])}"]
    first, second = next_commands(last, sweep=len(done) > 1)
    lines += [f"next:        {first}", f"             {second}"]
    return "\n".join(lines)


def exit_code(done: Sequence[Done]) -> int:
    """Return the exit code of one run, or of the first one of a sweep that did not finish.

    Args:
        done: the jobs that ran.
    """
    codes = [job.result.exit_code for job in done if job.result is not None]
    return next((code for code in codes if code), 0)


def _what_happened(done: Done) -> Iterator[str]:
    name = shlex.join([done.recipe, *done.overrides])
    if done.result is None:
        yield f"{name}: handed to SLURM as job {done.job}; its output will be in {done.config['run_dir']}"
        return
    result = done.result
    length = f" after {result.steps} steps, {result.seconds:.0f} s" if result.seconds else ""
    yield f"{name}: {result.end}{length}"
    if result.end != "finished":
        yield f"  {result.message}"
    metrics = _headline(result)
    if metrics:
        yield f"  {metrics}"
    yield f"  folder: {done.config['run_dir']}"
    if result.checkpoint:
        yield f"  checkpoint: {result.checkpoint}"


def _headline(result: Result) -> str:
    names = [name for name in _HEADLINE if name in result.metrics] or sorted(result.metrics)[:5]
    return "  ".join(f"{name} {result.metrics[name]:.4g}" for name in names)


def next_commands(done: Done, *, sweep: bool = False) -> tuple[str, str]:
    """Return the two commands one would type after a run.

    Args:
        done: the run.
        sweep: whether it was one of several.
    """
    mine = [word for word in done.overrides if not word.startswith(("resume=", "run_dir="))]
    trusts = [f"--trust={package}" for package in done.config["trust"]]
    train = ["stabletrain", "train", done.recipe, *trusts, *mine]
    folder = Path(done.config["run_dir"])
    again = [*train, f"resume={done.result.checkpoint if done.result else folder}"]
    has_checkpoint = done.result is not None and done.result.checkpoint is not None
    if done.result is None:
        return shlex.join(["squeue", "--jobs", str(done.job)]), shlex.join(
            ["tail", "-f", f"{folder}/slurm-{done.job}.out"]
        )
    if done.result.end == "finished":
        seeds = [word for word in train if not word.startswith("seed=")]
        clips = [word for word in train if not word.startswith("plugins/clip=")]
        return shlex.join([*seeds, "-m", "seed=1,2,3"]), shlex.join([*clips, "-m", "plugins/clip=none,zscore"])
    if done.result.end in ("interrupted", "terminated", "killed") and has_checkpoint:
        return shlex.join(again), shlex.join(["ls", str(folder / "checkpoints")])
    if done.result.end == "stopped":
        lower = (done.config.get("optimizer") or {}).get("lr")
        calmer = [*train, f"optimizer.lr={lower / 3:.3g}"] if isinstance(lower, float | int) else again
        return shlex.join(["tail", str(folder / "events.jsonl")]), shlex.join(calmer)
    look = shlex.join(["less", str(folder / "worker.log")])
    return look, shlex.join(again if has_checkpoint else ["stabletrain", "validate", *train[2:]])
