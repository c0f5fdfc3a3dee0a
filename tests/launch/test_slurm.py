"""SLURM with fake sbatch and srun programs: what is submitted, and what the batch script does."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stabletrain.config.problems import ConfigError
from stabletrain.errors import UserError
from stabletrain.launch import final_status
from stabletrain.launch.rank_ends import RankEnd, write_end
from stabletrain.launch.result import Result, read_result
from stabletrain.launch.slurm import batch_script, submit


@pytest.fixture
def slurm_config(config: dict[str, Any]) -> dict[str, Any]:
    Path(config["run_dir"]).mkdir()
    config["launch"] = {
        "kind": "slurm",
        "processes": 4,
        "nodes": 2,
        "threads": 3,
        "sbatch": {"partition": "gpu", "exclusive": None},
    }
    return config


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/bash\n" + text)
    (folder / name).chmod(0o755)


def test_the_script_requests_the_resources_of_the_config(slurm_config: dict[str, Any]) -> None:
    """Bug: resources other than configured; an environment variable that runs as a command."""
    script = batch_script(slurm_config, Path("/run.yaml"), {**os.environ, "STABLETRAIN_TRUST": "a b;rm"})
    for line in ("nodes=2", "ntasks-per-node=4", "cpus-per-task=3", "partition=gpu", "exclusive\n"):
        assert f"#SBATCH --{line}" in script
    assert "export STABLETRAIN_TRUST='a b;rm'" in script


def test_the_job_is_submitted_and_sets_its_final_status(
    slurm_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no launcher waits for a batch job: its script has to set the status, whatever happened to the worker
    program(tmp_path / "bin", "sbatch", 'echo "4711;cluster"')
    program(tmp_path / "bin", "srun", "exit 137")
    Result(end="terminated").write(Path(slurm_config["run_dir"]))  # of an attempt before the job was requeued
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    run_yaml = Path(slurm_config["run_dir"]) / "run.yaml"
    run_yaml.write_text(yaml.safe_dump(slurm_config))
    assert submit(slurm_config, run_yaml, os.environ) == "4711"
    done = subprocess.run(["bash", str(run_yaml.parent / "job.sbatch")], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert '"killed"' in (run_yaml.parent / "result.json").read_text()


def test_the_first_cause_of_a_batch_job_is_its_end(slurm_config: dict[str, Any], capfd: Any) -> None:
    """Bug: srun's SIGTERM to the other ranks makes a bug "terminated", and the job is requeued for ever."""
    folder = Path(slurm_config["run_dir"])
    run_yaml = folder / "run.yaml"
    run_yaml.write_text(yaml.safe_dump(slurm_config))
    write_end(RankEnd(rank=0, result=Result(end="terminated", steps=3)), folder)
    write_end(RankEnd(rank=5, result=Result(end="failed", message="a bug")), folder)
    assert final_status.main([str(run_yaml), "143"]) == 1
    result = read_result(folder)
    assert result is not None
    assert (result.end, result.message, result.steps) == ("failed", "rank 5: a bug", 3)
    run_yaml.unlink()
    assert final_status.main([str(run_yaml), "0"]) == 1
    assert "run.yaml: cannot be read" in capfd.readouterr().err


def test_a_rejected_job_is_an_error_with_its_reason(
    slurm_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a rejected job counts as submitted."""
    program(tmp_path / "bin", "sbatch", 'echo "invalid partition" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="invalid partition"):
        submit(slurm_config, Path(slurm_config["run_dir"]) / "run.yaml", os.environ)


def test_a_machine_without_slurm_is_an_error(
    slurm_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a FileNotFoundError."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on this machine"):
        submit(slurm_config, Path(slurm_config["run_dir"]) / "run.yaml", os.environ)


def test_a_line_break_cannot_add_a_line_to_the_script() -> None:
    """Bug: a value in the config adds commands to the batch script."""
    from stabletrain.config.compose import compose
    from stabletrain.config.validate import check

    tiny = str(Path(__file__).parent / "tiny.yaml")
    found = check(compose(tiny, ["launch=slurm", 'launch.sbatch.comment="a\nrm -rf ~"']), ["tiny_workload"])
    assert any(problem.key == "launch.sbatch.comment" for problem in found), str(ConfigError(found))


def test_a_value_is_one_word_for_sbatch(slurm_config: dict[str, Any]) -> None:
    """Bug: a blank begins another option, for instance one that sets the environment of the job."""
    slurm_config["launch"]["sbatch"] = {"account": "a --export=ALL,X=1", "comment": "it's #1"}
    script = batch_script(slurm_config, Path("/run.yaml"), os.environ)
    assert r"#SBATCH --account=a\ --export=ALL,X=1" in script
    assert r"#SBATCH --comment=it\'s\ \#1" in script


def test_a_folder_with_a_line_break_ends_no_line_of_the_script(slurm_config: dict[str, Any]) -> None:
    """Bug: ``run_dir`` of a recipe becomes a command of the batch script."""
    slurm_config["run_dir"] = "/runs/a\ntouch PWNED #"
    with pytest.raises(UserError, match="without control characters"):
        batch_script(slurm_config, Path("/run.yaml"), os.environ)
