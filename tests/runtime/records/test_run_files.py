"""The table of a run folder's files, and the modules that must not import torch to use it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stabletrain.config.resume import checkpoint_of_run, resume_problem
from stabletrain.runtime.records import run_files


@pytest.mark.parametrize(
    "module",
    [
        "stabletrain.runtime.records.run_files",
        "stabletrain.runtime.signal_watch",
        "stabletrain.config.resume",
        "stabletrain.launch.batch_job",
        "stabletrain.launch.worker",
    ],
)
def test_importing_loads_neither_torch_nor_lightning(module: str) -> None:
    """Bug: seconds of imports before the launcher or a batch script can do anything, or before signals are handled."""
    code = f"import sys, {module}; print([name for name in ('torch', 'lightning', 'mlflow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_diagnoses_are_artifacts(tmp_path: Path) -> None:
    """Bug: the report of why a run was stopped is not in MLflow."""
    (tmp_path / "diagnosis-42").mkdir()
    names = [path.name for path in run_files.artifacts(tmp_path)]
    assert names[-1] == "diagnosis-42"
    assert {"events.jsonl", "steps.bin", "interventions.jsonl", "result.json", "environment"} <= set(names)


def test_no_checkpoint_of_a_run_that_saved_none(tmp_path: Path) -> None:
    """Bug: the run's folder itself is offered as a checkpoint to resume from."""
    assert checkpoint_of_run(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint_of_run(tmp_path) is None


def test_a_cut_checkpoint_is_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    """Bug: a full disk leaves a cut step=3.ckpt, and the summary suggests to resume from it."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, cut, time in (("step=2.ckpt", 0, 1), ("step=3.ckpt", 30, 2)):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", b"x" * 100)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) - cut])
        os.utime(folder / name, (time, time))
    assert checkpoint_of_run(tmp_path) == (folder / "step=2.ckpt").resolve()
    (folder / "step=2.ckpt").unlink()
    assert checkpoint_of_run(tmp_path) is None
    assert "truncated" in str(resume_problem(str(tmp_path)))
