"""Running a worker as a SLURM batch job: a script in the run's folder, handed to sbatch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError

SCRIPT = "job.sbatch"


def batch_script(config: Mapping[str, Any], run_yaml: Path, environment: Mapping[str, str]) -> str:
    """Return the batch script of a run.

    srun starts one worker per device; whatever happens to them, the script settles the run's status afterwards.

    Args:
        config: the resolved run.
        run_yaml: its file.
        environment: the worker's environment; only what differs from the present one is written down.
    """
    launch = config["launch"]
    options = {
        "job-name": config["recipe"],
        "nodes": launch["nodes"],
        "ntasks-per-node": launch["processes"],
        "cpus-per-task": launch["threads"],
        "chdir": os.getcwd(),
        "output": f"{config['run_dir']}/slurm-%j.out",
        # SLURM sends SIGTERM this many seconds before the time is up: enough to end a batch and save.
        "signal": "TERM@120",
        **(launch.get("sbatch") or {}),
    }
    head = [f"#SBATCH --{key}" + ("" if value is None else f"={value}") for key, value in options.items()]
    changed = {key: value for key, value in environment.items() if os.environ.get(key) != value}
    exports = [f"export {key}={shlex.quote(value)}" for key, value in changed.items()]
    worker = shlex.join([sys.executable, "-m", "stabletrain.worker", str(run_yaml)])
    settle = shlex.join([sys.executable, "-m", "stabletrain.launch.settle", str(run_yaml)])
    body = [f"srun --kill-on-bad-exit=1 {worker}", f'{settle} "$?"']
    return "\n".join(["#!/bin/bash", *head, "", *exports, *body, ""])


def submit(config: Mapping[str, Any], run_yaml: Path, environment: Mapping[str, str]) -> str:
    """Write the script into the run's folder, hand it to sbatch, and return the job's number.

    Args:
        config: the resolved run.
        run_yaml: its file.
        environment: the worker's environment.

    Raises:
        UserError: if there is no sbatch here, or it refuses the job.
    """
    script = Path(config["run_dir"]) / SCRIPT
    script.write_text(batch_script(config, run_yaml, environment), encoding="utf-8")
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            "launch: there is no sbatch on this machine; log in where SLURM is, or use launch=local"
        ) from None
    if done.returncode != 0:
        raise UserError(f"launch: sbatch refused {script}: {done.stderr.strip()}; correct launch.sbatch.*")
    return done.stdout.strip().split(";")[0]
