"""``launch=slurm`` on a real SLURM of one node, which runs without being installed: tools/get_slurm.sh."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import LAUNCH, Cli
from slurm_cluster import HOW, Cluster, packages
from undisturbed import tiny_weights

from stabletrain.launch.process_tree import children, kill_tree
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


def test_a_cancelled_job_ends_with_a_checkpoint_and_its_status(cluster: Cluster, tmp_path: Path) -> None:
    """Bug: scancel leaves the run RUNNING in MLflow, without a checkpoint, or the job is put back into the queue."""
    run = submit(cluster, tmp_path, "model.pause=1", "launch.requeue=true")
    wait_for(cluster, run, "RUNNING", steps=2)
    cluster("scancel", "1")
    wait_for(cluster, run, "CANCELLED")
    assert status(tmp_path) == "KILLED"
    (only,) = attempts(run)
    assert only["cause"] == "terminated"
    assert load(run / "checkpoints")["global_step"] == only["step"]
