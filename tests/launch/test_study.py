"""The study of a sweep, and the callback of a trial."""

import math
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from stabletrain.config.search_space import parse_space
from stabletrain.errors import UserError
from stabletrain.launch.result import End, Result
from stabletrain.launch.trial_end import has_diverged, no_such_metric, state_of
from stabletrain.runtime.records.run_files import STEPS
from stabletrain.runtime.records.steps_file import StepsFile
from stabletrain.runtime.stop import TrainingStopped
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.tracking.ownership import this_process

optuna = pytest.importorskip("optuna")

from stabletrain.launch.pruning import PruneTrial  # noqa: E402
from stabletrain.launch.study import Goal, Study, default_storage, open_storage, storage_address  # noqa: E402

SPACE = parse_space(["optimizer.lr=log(1e-4,1e-1)"])
GOAL = Goal(metric="val/loss", direction="minimize")
CONFIG = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "seed": 0, "run_dir": None, "plugins": {"clip": None}}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of studies; making its tables takes a second."""
    path = tmp_path_factory.mktemp("studies") / "optuna.db"
    open_storage(storage_address(str(path)))
    return path


@pytest.fixture
def folder(empty: Path, tmp_path: Path) -> Path:
    shutil.copy(empty, tmp_path)
    return tmp_path


def study(folder: Path, file: str = "optuna.db", **changed: Any) -> Study:
    given = {"name": "s", "space": SPACE, "goal": GOAL, "config": CONFIG, "seed": 0, **changed}
    return Study(storage_address(str(folder / file)), **given)


def test_going_on_is_as_if_it_had_never_ended(folder: Path) -> None:
    """Bugs: the same seed proposes the first values again; a sweep that was cut proposes other values than a whole
    one; a trial's value, state or notes are lost."""
    whole = cut = study(folder)
    values: list[float] = []
    for at in range(13):
        if at % 6 == 0:
            cut = study(folder, name="cut")
        trial, same = whole.ask(), cut.ask()
        assert (trial.number, trial.words) == (same.number, same.words) == (at, trial.words)
        values.append(float(trial.words[0].partition("=")[2]))
        for each in (whole, cut):
            pruned = values[-1] > 0.03
            each.tell(at, "pruned" if pruned else "complete", None if pruned else values[-1], run_id=f"r{at}")
    assert len(set(values)) == 13
    assert all(1e-4 <= value <= 1e-1 for value in values)
    assert {trial.state.name for trial in cut.trials} == {"COMPLETE", "PRUNED"}
    assert [trial.user_attrs["run_id"] for trial in cut.trials] == [f"r{at}" for at in range(13)]


def test_trials_of_a_killed_sweep_are_failed_and_those_of_a_living_one_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs: a trial stays RUNNING for ever; a second sweep of the same study ends the trials of the first."""
    with monkeypatch.context() as patch:
        patch.setattr("stabletrain.launch.study.this_process", lambda: this_process()._replace(started="1"))
        study(folder).ask()
    mine = study(folder)
    assert mine.abandoned == 1
    assert mine.ask().number == 1
    again = study(folder)
    assert again.abandoned == 0
    assert [trial.state.name for trial in again.trials] == ["FAIL", "RUNNING"]


def test_trials_that_cannot_be_compared(folder: Path) -> None:
    """Bugs: a study of another space, goal or config gets further trials; what changes nothing is refused."""
    study(folder).ask()
    other = {
        "is of another search space, optimizer.lr=log(0.0001,0.1), got optimizer.lr=log(0.001,0.1)": {
            "space": parse_space(["optimizer.lr=log(1e-3,1e-1)"])
        },
        "is to minimize val/loss, got maximize val/loss": {"goal": Goal(metric="val/loss", direction="maximize")},
        "is of another config: seed 0 -> 1; name another study": {"config": {**CONFIG, "seed": 1}},
    }
    for expected, changed in other.items():
        with pytest.raises(UserError) as found:
            study(folder, **changed)
        assert expected in str(found.value)
        assert "1 trials are in sqlite:///" in str(found.value)
    study(folder, **changed, name="another").ask()
    same = {**CONFIG, "optimizer": {"lr": 0.2, "betas": [0.9, 0.99]}, "run_dir": "/elsewhere", "logger": {"a": 1}}
    study(folder, config=same)


def test_databases_that_are_not_optunas(tmp_path: Path) -> None:
    """Bugs: Optuna's tables in MLflow's database; a traceback for a file that is no database, or a folder."""
    path = tmp_path / "optuna.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("CREATE TABLE experiments (id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"is a database of another program.*--storage"):
        study(tmp_path)
    assert path.read_bytes() == before
    path.write_bytes(b"no database at all " * 100)
    with pytest.raises(UserError, match=r"cannot be used \(file is not a database\).*--storage"):
        study(tmp_path)
    with pytest.raises(UserError, match="cannot be used"):
        study(tmp_path / "missing")
    assert default_storage(f"sqlite:///{tmp_path}/mlflow.db") == f"sqlite:///{path}"
    assert default_storage("http://localhost:5000") == default_storage(None) == f"sqlite:///{Path.cwd()}/optuna.db"


ENDS: list[tuple[End, float | None, str]] = [
    ("finished", 1.5, "complete"),
    ("finished", math.nan, "pruned"),
    ("finished", math.inf, "pruned"),
    ("finished", None, "failed"),
    ("stopped", None, "pruned"),
    ("stopped", 1.5, "pruned"),
    ("failed", 1.5, "failed"),
    ("killed", None, "failed"),
    ("interrupted", 1.5, "failed"),
    ("terminated", None, "failed"),
    ("refused", None, "failed"),
]


@pytest.mark.parametrize(("end", "value", "expected"), ENDS)
def test_how_a_run_ends_is_what_the_sampler_learns(tmp_path: Path, end: End, value: Any, expected: str) -> None:
    """Bugs: a run that diverged is failed, so that the sampler goes on proposing what diverges; a killed one is bad."""
    state, why = state_of({"run_dir": str(tmp_path)}, Result(end=end, message="so"), value)
    assert state == expected
    assert bool(why) == (expected != "complete")


def test_divergence(tmp_path: Path) -> None:
    """Bugs: a finished run with a loss above its start is complete; noise of a rate that is too low is a divergence; a
    loss that exploded in its second step, before any curve could show it, is complete."""
    falling = [4.0 - 0.01 * step for step in range(200)]
    for number, (losses, expected) in enumerate(
        [
            (falling, False),
            ([], False),
            ([4.0 + 0.05 * (-1) ** step for step in range(200)], False),
            ([*falling, *[14.9] * 20], True),
            ([*falling, *[math.nan] * 20], True),
            ([*falling[:100], math.nan, *falling[100:]], False),
            ([math.nan] * 3 + falling, False),
            ([math.nan] * 30, True),
            ([2.3, 500.0, 800.0, *[31.0] * 63], True),
            ([2.3, 500.0, 800.0, *[31.0] * 400], True),
            ([-2.0 + 0.05 * step for step in range(30)], True),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "run.yaml").write_text("recipe: digits_cnn\n")
        steps = StepsFile(folder / STEPS)
        for step, loss in enumerate(losses):
            steps.append(step, loss, 1.0, 1)
        steps.close()
        assert has_diverged({"run_dir": str(folder)}, Result(end="finished")) is expected, number
    for value, expected in ((math.nan, True), (-math.inf, True), (2.0, False)):
        result = Result(end="finished", metrics={"stability/loss": value})
        assert has_diverged({"run_dir": str(tmp_path)}, result) is expected


def test_an_objective_that_no_run_logs() -> None:
    """Bug: the message does not say what there is."""
    assert str(no_such_metric("val/los", {"val/loss": 1.0, "train/loss": 2.0})) == (
        "sweep: no run logs 'val/los'; did you mean 'val/loss'?; choose another objective. The run has logged: "
        "train/loss, val/loss"
    )


class Logs(LightningModule):
    """Logs given values, one at each validation."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.weight, self.values, self.reached = torch.nn.Parameter(torch.ones(1)), list(values), 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.weight.square().sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.values[self.reached])

    def on_validation_epoch_end(self) -> None:
        self.reached += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(values: list[float], callback: Any, **options: Any) -> Logs:
    module, loader = Logs(values), torch.utils.data.DataLoader(range(8))
    options = {"max_epochs": 1, "val_check_interval": 2, **options}
    quiet_trainer(callback, **options).fit(module, loader, torch.utils.data.DataLoader(range(1)))
    return module


def test_a_trial_is_reported_by_step_and_stopped(folder: Path) -> None:
    """Bugs: reported by epoch, all validations of one epoch are one; a trial that is worse than the others goes on;
    a good one, or one of the first, is stopped; the check before training is reported; NaN goes on."""
    mine = study(folder)

    def prune(trial: Any) -> PruneTrial:
        return PruneTrial(storage=mine.address, study="s", trial=trial.id, metric="val/loss", startup=2)

    for _ in range(2):
        trial = mine.ask()
        assert fit([9.0, 4.0, 3.0, 2.0, 1.0], prune(trial), num_sanity_val_steps=1).reached == 5
        mine.tell(trial.number, "complete", 1.0)
    assert mine.trials[0].intermediate_values == {2: 4.0, 4: 3.0, 6: 2.0, 8: 1.0}
    good = mine.ask()
    assert fit([3.0, 2.0, 1.0, 0.5], prune(good)).reached == 4
    bad = mine.ask()
    with pytest.raises(TrainingStopped, match="val/loss 7 at step 6 is worse than the median of the trials"):
        fit([3.0, 8.0, 7.0, 6.0], prune(bad))
    for value in (math.nan, math.inf):
        trial = mine.ask()
        with pytest.raises(TrainingStopped, match=f"val/loss is {value} at step 2"):
            fit([value, 1.0, 1.0, 1.0], prune(trial))


def test_a_study_that_is_gone_does_not_end_the_run(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: hours of training are lost with a database; a metric that is not logged is an error."""
    gone = PruneTrial(storage=storage_address(str(folder / "a" / "b.db")), study="s", trial=1, metric="val/loss")
    assert fit([1.0, 1.0, 1.0, 1.0], gone).reached == 4
    assert "the run goes on" in caplog.text
    mine = study(folder)
    other = PruneTrial(storage=mine.address, study="s", trial=mine.ask().id, metric="val/accuracy")
    fit([1.0, 1.0, 1.0, 1.0], other)
    assert mine.trials[0].intermediate_values == {}
