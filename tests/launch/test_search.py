"""``stabletrain sweep`` through the command line."""

import signal
import sqlite3
import time
from pathlib import Path

import pytest
from processes import LAUNCH

from stabletrain.config.search_space import parse_space
from stabletrain.errors import UserError
from stabletrain.launch.launcher import LaunchRequest
from stabletrain.launch.search import SearchOptions, prepare_search
from stabletrain.launch.study import Goal

optuna = pytest.importorskip("optuna")

TINY = str(LAUNCH / "tiny.yaml")
LOSS = Goal(metric="val/loss", direction="minimize")
WORDS = ("sweep", "digits_cnn", "--over", "optimizer.lr=log(1e-3,30)", "--minimise", "val/loss")
SHORT = ("trainer.max_epochs=1", "trainer.enable_model_summary=false", "data.batch_size=256")


def trials(folder: Path) -> list[tuple[str, str, float]]:
    """State, end of the run and learning rate of every trial."""
    study = optuna.load_study(study_name="digits_cnn/optimizer.lr", storage=f"sqlite:///{folder}/optuna.db")
    return [(t.state.name, t.user_attrs.get("end", ""), t.params["optimizer.lr"]) for t in study.trials]


@pytest.mark.parametrize(
    ("words", "options", "expected"),
    [
        (["optimizer.lr=0.1"], {}, "optimizer.lr=0.1: --over varies this key"),
        (["++optimizer.lr=0.1"], {}, "--over varies this key"),
        (["launch=slurm"], {}, "launch=local"),
        (["seed=1,2"], {}, "seed=1,2: several values need several runs; vary the key with --over"),
        (["dry_run=true"], {}, "remove dry_run"),
        ([], {"space": parse_space(["recipe=char_gpt,digits_cnn"])}, "--over recipe=...: expected a key that"),
        ([], {"space": parse_space(["plugins/clip=zscore,zscor"])}, "zscor"),
        ([], {"space": parse_space(["trainer.max_epochs=int(0,3)"])}, "trainer.max_epochs"),
    ],
)
def test_mistakes_before_anything_runs(words: list[str], options: object, expected: str) -> None:
    """Bugs: found by the first trial, or not at all; the study is made nevertheless."""
    given = {"space": parse_space(["optimizer.lr=log(1e-3,1)"]), "goal": LOSS, **options}  # type: ignore[dict-item]
    with pytest.raises(UserError) as found:
        prepare_search(LaunchRequest(recipe="digits_cnn", overrides=tuple(words)), SearchOptions(**given))  # type: ignore[arg-type]
    assert expected in str(found.value)
    assert not Path("optuna.db").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--trials", "0"), "--trials: expected at least 1, got 0"),
        (("--maximise", "val/accuracy"), "expected one objective"),
    ],
)
def test_options(cli, options: tuple[str, ...], expected: str) -> None:
    """Bug: a traceback, or a sweep of nothing."""
    done = cli(*WORDS, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: sweep: {expected}")


@pytest.mark.slow
def test_a_sweep_is_killed_and_gone_on_with(cli) -> None:
    """Bugs: a killed sweep's trial stays RUNNING; the same first values again; a diverged run is complete; Optuna's
    tables are in MLflow's database; the children have no parent; another space is mixed in."""
    process = cli.start(*WORDS, *SHORT, "--trials", "2")
    deadline = time.monotonic() + 250
    while not list(cli.folder.glob("runs/*/*/worker.log")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate()
    done = cli(*WORDS, *SHORT, "--trials", "2", "--jobs", "2", "optimizer.momentum=0.9", "--study", "other")
    assert done.returncode == 0, done.stderr
    done = cli(*WORDS, *SHORT, "--trials", "1")
    assert done.returncode == 0, done.stderr
    assert "going on with study digits_cnn/optimizer.lr: 1 trials, 1 of them left by a killed sweep" in done.stdout
    found = trials(cli.folder)
    assert [state for state, _, _ in found] == ["FAIL", "COMPLETE"]
    assert found[0][2] != found[1][2]
    assert f"next:   stabletrain train digits_cnn {' '.join(SHORT)} optimizer.lr={found[1][2]!r}" in done.stdout
    with sqlite3.connect(cli.folder / "mlflow.db") as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert "runs" in tables
    assert "studies" not in tables
    runs = {run.info.run_id: run for run in cli.runs()}
    parents = [run.data.tags.get("mlflow.parentRunId") for run in runs.values()]
    assert all(parent is None or parent in runs for parent in parents)
    assert parents.count(None) == 3
    names = [run.info.run_name for run in runs.values()]
    assert f"trial 1: optimizer.lr={found[1][2]:.4g}" in names
    unknown = cli(*WORDS[:3], "optimizer.lrr=log(1e-3,1)", *WORDS[4:], *SHORT)
    assert unknown.returncode == 2
    assert unknown.stderr == "error: optimizer.lrr: SGD has no argument 'lrr'; did you mean 'lr'?\n"
    other = cli(*WORDS[:3], "optimizer.lr=log(1e-3,1)", *WORDS[4:], *SHORT)
    assert other.returncode == 2
    assert "is of another search space" in other.stderr
    assert other.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_objective_that_no_run_logs_and_ctrl_c(cli) -> None:
    """Bugs: a whole sweep is run before the message; Ctrl-C counts as a bad value, or the next trial begins."""
    words = ("sweep", TINY, "--trust", "tiny_workload", "--over", "seed=int(1,100)", "plugins/gradients=monitor")
    done = cli(*words, "--minimise", "val/los")
    assert done.returncode == 2, done.stdout
    assert "error: sweep: no run logs 'val/los'" in done.stderr
    assert "stability/loss" in done.stderr
    hangs = ("model.at=1", "model.does=hang", "--study", "hangs")
    process = cli.start(*words, *hangs, "--minimise", "stability/loss")
    deadline = time.monotonic() + 250
    while len(list(cli.folder.glob("runs/*/*/worker.log"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
    out, _ = process.communicate(timeout=60)
    assert process.returncode in (1, 130, -signal.SIGINT)  # the third one may meet an interpreter that is ending
    study = optuna.load_study(study_name="hangs", storage=f"sqlite:///{cli.folder}/optuna.db")
    assert [trial.state.name for trial in study.trials] == ["FAIL"]
    assert "1 failed" in out
