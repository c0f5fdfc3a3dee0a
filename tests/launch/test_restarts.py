"""Real processes that die and go on: the same weights, one folder, one run in MLflow."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import LAUNCH
from undisturbed import tiny_weights

from stabletrain.launch.attempts import read_attempts
from stabletrain.runtime.checkpoints import load
from stabletrain.runtime.records.steps_file import read_steps

sys.path.insert(0, str(LAUNCH))

STEPS = 12
SAVED = ("plugins/checkpoints=save", "plugins.checkpoints.every=3", "plugins.checkpoints.background=false")
EXACT = ("plugins/resume=exactly", *SAVED, f"trainer.max_steps={STEPS}", "run_dir=run")
DIES = ("+chaos._target_=stabletrain.chaos.SendSignal", "+chaos.at_step=8")


def assert_same_weights(folder: Path, ranks: int) -> None:
    found: dict[str, Any] = load(folder / "checkpoints")["state_dict"]
    expected = tiny_weights(STEPS, ranks=ranks)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_killed_worker_is_replaced(cli) -> None:
    """Bugs: the run ends at the first death; the second attempt begins anew, or skips or repeats a step; its records
    hold steps twice, or those of the last attempt only."""
    done = cli.tiny(*EXACT, *DIES, "launch.restarts=1", "seed=0")
    folder = cli.folder / "run"
    assert done.returncode == 0, done.stderr
    assert "attempt 1 has died at step 8: the worker was killed by signal 9" in done.stderr
    assert "attempt 2 goes on from step 6; steps lost, which are made again: 2" in done.stderr
    assert_same_weights(folder, ranks=1)
    first, second = read_attempts(folder)
    assert (first.cause, first.step, first.from_step) == ("killed", 8, 0)
    assert (second.cause, second.step, second.from_step, second.steps_lost) == ("finished", STEPS, 6, 2)
    assert second.seconds_lost > 0
    assert read_steps(folder / "steps.bin").step.tolist() == list(range(STEPS))
    assert not (folder / "resumes.json").exists()


@pytest.mark.slow
def test_a_killed_rank_under_torchrun(cli) -> None:
    """Bugs: a rank's death ends the run, or leaves the other one waiting; ranks go on from different steps; MLflow has
    two runs, or one that failed, or two values of a step; the ranks write into one log."""
    rank = ("launch=torchrun", "+chaos.rank=1", "plugins/gradients=monitor", "logger=mlflow")
    done = cli.tiny(*EXACT, *DIES, *rank, "trainer.log_every_n_steps=1")
    folder = cli.folder / "run"
    assert done.returncode == 0, done.stderr
    assert "first cause: rank 1 was killed by signal 9" in done.stderr
    assert "attempt 2 goes on from step 6" in done.stderr
    assert_same_weights(folder, ranks=2)
    first, second = read_attempts(folder)
    assert (first.cause, first.ranks, first.step) == ("killed", (1,), 8)
    assert (second.cause, second.from_step) == ("finished", 6)
    assert sorted(str(each.relative_to(folder)) for each in folder.glob("logs/*/*")) == [
        f"logs/attempt-{attempt}/rank-{number}.log" for attempt in (1, 2) for number in (0, 1)
    ]
    assert "(step 8, rank 1)" in (folder / "logs/attempt-1/rank-1.log").read_text()
    assert "(step 8, rank 1)" not in (folder / "worker.log").read_text()
    assert "consequence: rank 0" in (folder / "crash-1.txt").read_text()

    from mlflow import MlflowClient

    (run,) = cli.runs()
    assert run.info.status == "FINISHED"
    assert run.data.tags["stabletrain.attempts"] == "2"
    client = MlflowClient(f"sqlite:///{cli.folder}/mlflow.db")
    logged = [name for name in run.data.metrics if name.startswith("stability/grad_norm")]
    assert logged
    for name in logged:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
        assert len(steps) == len(set(steps)), name
        assert max(steps) >= STEPS - 1
    assert "attempts.jsonl" in cli.artifacts(run)


@pytest.mark.slow
def test_a_stopped_rank_under_torchrun(cli) -> None:
    """Bugs: a rank that hangs is waited for until somebody comes; the restart meets the old processes; it is the
    waiting rank that is blamed."""
    words = ("launch=torchrun", "launch.timeout=8s", "+chaos.rank=1", "+chaos.signal=SIGSTOP")
    done = cli.tiny(*EXACT, *DIES, *words)
    assert done.returncode == 0, done.stderr
    assert "rank 1 did not answer for 8 s (launch.timeout)" in done.stderr
    assert_same_weights(cli.folder / "run", ranks=2)
    first, second = read_attempts(cli.folder / "run")
    assert (first.ranks, second.cause, second.from_step) == ((1,), "finished", 6)


@pytest.mark.slow
def test_a_fault_at_one_place_ends_with_exit_code_3(cli) -> None:
    """Bugs: the same exception is repeated for ever, ends the run at the first time, or with exit code 1."""
    words = ("model.does=raise", "model.at=4", "launch.restarts=1")
    done = cli.tiny(*EXACT, *words)
    assert done.returncode == 3, done.stderr
    result = json.loads((cli.folder / "run" / "result.json").read_text())
    assert result["end"] == "stopped"
    assert "2 attempts died at step 4" in result["message"]
    assert "each time the same: RuntimeError: a bug in the user's module" in result["message"]
