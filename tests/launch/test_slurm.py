"""SLURM with fake sbatch, srun and scontrol programs: what is submitted, and what the batch script does.

A real SLURM is in test_real_slurm.py.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stabletrain.config.problems import ConfigError
from stabletrain.errors import UserError
from stabletrain.launch import batch_job
from stabletrain.launch.attempts import read_attempts
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
    for line in ("nodes=2", "ntasks-per-node=4", "cpus-per-task=3", "partition=gpu", "exclusive\n", "requeue\n"):
        assert f"#SBATCH --{line}" in script
    assert "export STABLETRAIN_TRUST='a b;rm'" in script


def test_the_job_is_submitted_and_sets_its_final_status(
    slurm_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no launcher waits for a batch job: its script has to set the status, whatever happened to the worker
    program(tmp_path / "bin", "sbatch", 'echo "4711;cluster"')
    program(tmp_path / "bin", "srun", "exit 137")
    program(tmp_path / "bin", "scontrol", "echo JobState=RUNNING Restarts=0")
    Result(end="terminated").write(Path(slurm_config["run_dir"]))  # of an attempt before the job was requeued
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    run_yaml = Path(slurm_config["run_dir"]) / "run.yaml"
    run_yaml.write_text(yaml.safe_dump(slurm_config))
    assert submit(slurm_config, run_yaml, os.environ) == "4711"
    done = subprocess.run(["bash", str(run_yaml.parent / "job.sbatch")], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert '"killed"' in (run_yaml.parent / "result.json").read_text()


class FakeJob:
    """A SLURM job whose srun does what a test says; ``seen`` has the attempts of which srun was called."""

    def __init__(self, config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_yaml = Path(config["run_dir"]) / "run.yaml"
        self.run_yaml.write_text(yaml.safe_dump(config))
        self.bin, self._seen = folder / "bin", folder / "seen"
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        self.slurm_says("JobState=RUNNING Restarts=0")

    def slurm_says(self, text: str, requeue: str = "") -> None:
        program(
            self.bin,
            "scontrol",
            f'echo "$1" >> {self._seen}.asked\nif [ "$1" = show ]; then echo "{text}"; else echo "{requeue}"; fi',
        )

    def srun(self, text: str) -> None:
        program(self.bin, "srun", f"echo $STABLETRAIN_ATTEMPT >> {self._seen}\n{text}")

    def end(self, rank: int, result: Result, code: int) -> str:
        """Lines of srun that write the end of a rank."""
        write_end(RankEnd(rank=rank, result=result, agreed=result.end == "terminated"), self.run_yaml.parent)
        file = self.run_yaml.parent / "ends" / f"rank-{rank}.json"
        kept = self.bin.parent / f"{result.end}-{rank}.json"
        file.rename(kept)
        return f"mkdir -p {file.parent}; cp {kept} {file}; exit {code}"

    def __call__(self) -> int:
        return batch_job.main([str(self.run_yaml)])

    @property
    def seen(self) -> list[int]:
        return list(map(int, self._seen.read_text().split()))

    @property
    def asked(self) -> list[str]:
        return Path(f"{self._seen}.asked").read_text().split()

    @property
    def causes(self) -> list[str]:
        return [attempt.cause for attempt in read_attempts(self.run_yaml.parent)]


@pytest.fixture
def job(slurm_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeJob:
    slurm_config["plugins"] = {"checkpoints": {"_target_": "stabletrain.SaveCheckpoints", "folder": None}}
    slurm_config["launch"] |= {"restarts": 2, "progress_steps": 10, "requeue": False}
    return FakeJob(slurm_config, tmp_path, monkeypatch)


def test_the_first_cause_of_a_batch_job_is_its_end(job: FakeJob, capfd: Any) -> None:
    """Bug: srun's SIGTERM to the other ranks makes a bug "terminated", and the job is requeued for ever."""
    job.srun(job.end(5, Result(end="failed", message="a bug"), 143))
    assert job() == 1
    result = read_result(job.run_yaml.parent)
    assert result is not None
    assert (result.end, result.message) == ("failed", "rank 5: a bug")
    assert job.seen == [1], "a bug before the first step is not tried again"
    job.run_yaml.unlink()
    assert job() == 2
    assert "run.yaml: cannot be read" in capfd.readouterr().err


def test_a_death_is_restarted_within_the_job_until_the_budget_is_used(job: FakeJob, capfd: Any) -> None:
    """Bug: one dead rank ends the allocation; or the same place is tried for ever, with another exit code than 3."""
    job.srun("exit 137")
    assert job() == 3
    assert job.seen == [1, 2, 3]
    assert job.causes == ["killed"] * 3
    assert "launch.restarts: 2 of 2 without progress" in capfd.readouterr().err


def test_a_job_without_srun_ends_as_one_whose_processes_could_not_start(job: FakeJob, monkeypatch: Any) -> None:
    """Bugs: a traceback, and the run stays RUNNING; the attempt is recorded again when the job is started again."""
    monkeypatch.setenv("PATH", str(job.bin))
    assert job() == 1
    assert job.causes == ["failed"]
    assert job() == 1
    assert [each.attempt for each in read_attempts(job.run_yaml.parent)] == [1, 2]


def test_a_requeued_job_goes_on_with_the_next_attempt(job: FakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: the job begins anew; a preemption is a final end in MLflow, or counts as a death; an attempt whose job was
    killed before it could record anything is not counted, and its number is given again."""
    config = yaml.safe_load(job.run_yaml.read_text())
    job.run_yaml.write_text(yaml.safe_dump({**config, "launch": {**config["launch"], "processes": 1, "nodes": 1}}))
    suspended: list[bool] = []
    monkeypatch.setattr("stabletrain.launch.mlflow_run.suspend_run", lambda config: suspended.append(True))
    monkeypatch.setattr("stabletrain.launch.mlflow_run.finish_run", lambda config, result: suspended.append(False))
    job.slurm_says("JobState=COMPLETING Restarts=1")
    job.srun(job.end(0, Result(end="terminated", message="ended by SIGTERM"), 143))
    assert job() == 143
    assert (job.causes, suspended, job.asked[-1]) == (["terminated"], [True], "show")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (job.run_yaml.parent / "job.json").write_text('{"attempt": 2, "start_ns": 5}')
    job.srun(job.end(0, Result(end="finished"), 0))
    assert job() == 0
    assert (job.seen, job.causes, suspended[-1]) == ([1, 3], ["terminated", "terminated", "finished"], False)


@pytest.mark.parametrize(
    ("state", "scontrol_says", "requeues", "status"),
    [
        ("RUNNING", "", True, "SCHEDULED"),
        ("RUNNING", "no", True, "KILLED"),
        ("COMPLETING", "", False, "KILLED"),
    ],
)
def test_only_a_job_that_may_run_on_is_put_back_into_the_queue(
    job: FakeJob, state: str, scontrol_says: str, requeues: bool, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs: ``scancel`` puts the job back into the queue, so that nobody gets rid of it; a job that is queued has a
    final status; one that could not be put there has none."""
    statuses: list[str] = []
    monkeypatch.setattr("stabletrain.launch.mlflow_run.suspend_run", lambda config: statuses.append("SCHEDULED"))
    monkeypatch.setattr("stabletrain.launch.mlflow_run.finish_run", lambda config, result: statuses.append("KILLED"))
    config = yaml.safe_load(job.run_yaml.read_text())
    job.run_yaml.write_text(yaml.safe_dump({**config, "launch": {**config["launch"], "requeue": True}}))
    job.slurm_says(f"JobState={state} Restarts=0", requeue=scontrol_says)
    job.srun(job.end(0, Result(end="terminated", message="ended by SIGTERM"), 143))
    assert job() == 143
    assert ("requeue" in job.asked) is requeues
    assert statuses[-1] == status


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
