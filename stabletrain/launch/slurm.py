"""Run a worker as a SLURM batch job: write a script into the run's folder and submit it with sbatch.

The script runs `stabletrain.launch.batch_job`, which starts the workers with srun.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError
from stabletrain.launch.process import PYTHON
from stabletrain.runtime.records.run_files import SLURM_SCRIPT, slurm_output


def batch_script(config: Mapping[str, Any], run_yaml: Path, environment: Mapping[str, str]) -> str:
    """Return the batch script of a run.

    It takes the time and memory of one more process beside the workers: the one that waits for them.

    Args:
        config: the resolved config.
        run_yaml: path of the run's run.yaml.
        environment: the worker's environment; the script sets the variables that differ from the current ones.
    """
    launch = config["launch"]
    folders = (os.getcwd(), config["run_dir"])
    if not all(folder.isprintable() for folder in folders):  # a line of the script would end there
        raise UserError(f"launch: expected folders without control characters for a batch script, got {folders!r:.400}")
    options = {
        "job-name": config["recipe"],
        "nodes": launch["nodes"],
        "ntasks-per-node": launch["processes"],
        "cpus-per-task": launch["threads"],
        "chdir": os.getcwd(),
        "output": f"{config['run_dir']}/{slurm_output('%j')}",
        "signal": "TERM@120",  # of a run.yaml of an earlier version
        "requeue": None,  # a cluster may have another default, and a job that is started again goes on
        "open-mode": "append",
        **(launch.get("sbatch") or {}),
    }
    if "no-requeue" in options:
        del options["requeue"]
    head = [f"#SBATCH --{key}" + ("" if value is None else f"={_escaped(value)}") for key, value in options.items()]
    changed = {key: value for key, value in environment.items() if os.environ.get(key) != value}
    exports = [f"export {key}={shlex.quote(value)}" for key, value in changed.items()]
    job = shlex.join([*PYTHON, "-m", "stabletrain.launch.batch_job", str(run_yaml)])
    return "\n".join(["#!/bin/bash", *head, "", *exports, f"exec {job}", ""])


def _escaped(value: str | int) -> str:
    """Return a value for a line ``#SBATCH --option=value``, which sbatch splits at blanks as a shell does."""
    return re.sub(r"""([\s'"\\#])""", r"\\\1", str(value))


def submit(config: Mapping[str, Any], run_yaml: Path, environment: Mapping[str, str]) -> str:
    """Write the script into the run's folder, submit it with sbatch, and return the job's number.

    Args:
        config: the resolved config.
        run_yaml: path of the run's run.yaml.
        environment: the worker's environment.

    Raises:
        UserError: if sbatch is not installed, or rejects the job.
    """
    script = Path(config["run_dir"]) / SLURM_SCRIPT
    script.write_text(batch_script(config, run_yaml, environment), encoding="utf-8")
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            "launch: there is no sbatch on this machine; run on a login node of the SLURM cluster, or use launch=local"
        ) from None
    if done.returncode != 0:
        raise UserError(f"launch: sbatch rejected {script}: {done.stderr.strip()}; correct launch.sbatch.*")
    return done.stdout.strip().split(";")[0]
