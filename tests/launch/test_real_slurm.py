"""``launch=slurm`` on a real SLURM of one node, which runs without being installed: tools/get_slurm.sh."""

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import LAUNCH, Cli
from slurm_cluster import HOW, Cluster, packages
from undisturbed import tiny_weights

from stabletrain.launch.process_tree import children, kill_tree
from stabletrain.launch.rank_ends import RankEnd, write_end
from stabletrain.launch.result import Result
from stabletrain.launch.run_folder import write_run_yaml
from stabletrain.runtime.checkpoints.loading import load
from stabletrain.runtime.records.steps_file import RECORD_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.skipif(packages() is None, reason=HOW)]

TINY = str(LAUNCH / "tiny.yaml")
STEPS = 40
_LIMIT = 900.0
"""Seconds for each phase of a job on a crowded machine; the cluster kills what is left."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    root = packages()
    assert root is not None
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder), root) as running:
        yield running


def submit(cluster: Cluster, folder: Path, *words: str) -> Path:
    """Submit job 1, and return the run's folder."""
    run = folder / "run"
    checkpoints = ("plugins/checkpoints=save", "plugins.checkpoints.every=5", "plugins/resume=exactly")
    launch = ("launch=slurm", "launch.processes=2", "strategy=ddp", f"run_dir={run}")
    more = ("--trust", "tiny_workload", f"trainer.max_steps={STEPS}", "logger=mlflow", *words)
    done = Cli(folder)("train", TINY, *launch, *checkpoints, *more, **cluster.environment)
    assert "submitted to SLURM as job 1" in done.stdout, done.stdout + done.stderr
    return run


def wait_for(cluster: Cluster, run: Path, what: str, *, steps: int = 0) -> None:
    """Wait until a job has a state, or a number of recorded steps."""

    def is_so() -> bool:
        state = cluster.job("1").get("JobState", "")
        assert state not in ("FAILED", "TIMEOUT", "NODE_FAIL") or what == state, output(run)
        file = run / "steps.bin"
        return state == what and (file.stat().st_size if file.exists() else 0) >= steps * RECORD_BYTES

    cluster.until(is_so, f"{what}, {steps} steps\n{output(run)}", _LIMIT)


def output(run: Path) -> str:
    return "".join(path.read_text() for path in run.glob("slurm-*.out"))


def attempts(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def is_undisturbed(run: Path) -> bool:
    weights, found = tiny_weights(STEPS), load(run / "checkpoints")["state_dict"]
    return all(torch.equal(found[name], value) for name, value in weights.items())


def status(folder: Path) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return str(run.info.status)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LAUNCH))


def test_a_preempted_job_goes_on_and_a_killed_rank_is_restarted_within_it(cluster: Cluster, tmp_path: Path) -> None:
    """Bugs: the job that SLURM starts again begins anew, in another run; a preemption counts as a death; a rank that is
    killed ends the job; the weights differ from those of an undisturbed run."""
    run = submit(cluster, tmp_path, "model.pause=0.3")
    wait_for(cluster, run, "RUNNING", steps=3)
    cluster("scontrol", "requeue", "1")
    cluster.until(lambda: cluster.job("1").get("JobState") == "PENDING", "the job waits", _LIMIT)
    before = (run / "steps.bin").stat().st_size // RECORD_BYTES
    wait_for(cluster, run, "RUNNING", steps=before + 6)
    (victim, *_) = [pid for step in cluster.steps() for pid in children(step)]
    kill_tree(victim)
    wait_for(cluster, run, "COMPLETED")
    assert "attempt 3 goes on from step" in output(run)
    first, second, third = attempts(run)
    assert (first["cause"], second["cause"], third["cause"]) == ("terminated", "killed", "finished")
    assert second["from_step"] == before
    assert second["steps_lost"] == 0
    assert is_undisturbed(run)
    assert status(tmp_path) == "FINISHED"


class ShortJob:
    """A real job of two tasks whose workers are shell scripts: what SLURM does with signals, without any training."""

    def __init__(self, cluster: Cluster, folder: Path, config: dict[str, Any], *, requeue: bool) -> None:
        self.cluster, self.folder, self.run = cluster, folder, Path(config["run_dir"])
        (self.run / "checkpoints").mkdir(parents=True)
        launch = {"kind": "slurm", "processes": 2, "nodes": 1, "threads": 1, "timeout": 60, "requeue": requeue}
        checkpoints = {"_target_": "stabletrain.SaveCheckpoints", "folder": None}
        restarts = {"restarts": 3, "progress_steps": 10}
        write_run_yaml({**config, "plugins": {"checkpoints": checkpoints}, "launch": {**launch, **restarts}})
        for rank in (0, 1):
            for end, agreed in (("terminated", True), ("finished", False)):
                write_end(RankEnd(rank=rank, result=Result(end=end, message=end), agreed=agreed), folder)  # type: ignore[arg-type]
                (folder / "ends" / f"rank-{rank}.json").rename(folder / f"{end}-{rank}")
        (folder / "worker").write_text(
            f"""echo "rank $SLURM_PROCID of attempt $STABLETRAIN_ATTEMPT"
ended() {{ mkdir -p {self.run}/ends; cp {folder}/$1-$SLURM_PROCID {self.run}/ends/rank-$SLURM_PROCID.json; exit $2; }}
trap 'ended terminated 143' TERM
if [ -e {folder}/dies ] && [ $SLURM_PROCID = 1 ]; then rm {folder}/dies; kill -9 $$; fi
if [ -e {folder}/finishes ]; then ended finished 0; fi
for i in $(seq 600); do sleep 0.1; done
"""
        )
        code = f"from stabletrain.launch import batch_job; batch_job.PYTHON = ('/bin/sh', '{folder}/worker'); "
        code += f"raise SystemExit(batch_job.main(['{self.run}/run.yaml']))"
        head = ["ntasks-per-node=2", f"output={folder}/out", "open-mode=append", "requeue"]
        lines = [*(f"#SBATCH --{option}" for option in head), f"exec {shlex.join([sys.executable, '-c', code])}"]
        (folder / "job").write_text("\n".join(["#!/bin/bash", *lines, ""]))
        cluster("sbatch", str(folder / "job"))

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text() if (self.folder / "out").exists() else ""

    def wait(self, state: str, *, says: str = "") -> None:
        def is_so() -> bool:
            return self.cluster.job("1").get("JobState") == state and says in self.output

        self.cluster.until(is_so, f"{state} {says}", _LIMIT)


def test_a_cancelled_job_ends_for_good(cluster: Cluster, tmp_path: Path, config: dict[str, Any]) -> None:
    """Bugs: scancel starts another attempt, or puts the job back into the queue; the end is taken for a death."""
    job = ShortJob(cluster, tmp_path, config, requeue=True)
    job.wait("RUNNING", says="rank 1 of attempt 1")
    cluster("scancel", "1")
    job.wait("CANCELLED")
    assert "queue" not in job.output.replace("REQUEUE", "")
    assert [each["cause"] for each in attempts(job.run)] == ["terminated"]


def test_a_job_that_is_told_to_end_comes_back_and_a_killed_task_is_replaced(
    cluster: Cluster, tmp_path: Path, config: dict[str, Any]
) -> None:
    """Bugs: SIGTERM before the time limit ends the job for ever; a killed task ends it; attempts have no record."""
    job = ShortJob(cluster, tmp_path, config, requeue=True)
    job.wait("RUNNING", says="rank 1 of attempt 1")
    for name in ("dies", "finishes"):
        (tmp_path / name).touch()
    cluster("scancel", "--signal=TERM", "1")
    job.wait("COMPLETED", says="rank 0 of attempt 3")
    assert "put back into the queue (launch.requeue)" in job.output
    assert [each["cause"] for each in attempts(job.run)] == ["terminated", "killed", "finished"]
    assert cluster.job("1")["Restarts"] == "1"
