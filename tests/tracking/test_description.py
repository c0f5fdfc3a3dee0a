"""What MLflow's pages show of a run: its options, its description, who started it and how it ended."""

import getpass
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from stabletrain.launch import outcome_tag
from stabletrain.launch.mlflow_run import finish_run, open_run
from stabletrain.launch.result import End, Result
from stabletrain.launch.run_end import OUTCOME, numbers_of_end
from stabletrain.runtime.records.steps_file import Flag, StepsFile
from stabletrain.tracking.description import NOTE, RUNNING, note_at_end, note_at_start, source_tags

CHOICES = {
    "plugins/clip": "zscore", "plugins/spike": "rollback", "plugins/optimizer": "swap", "plugins/outliers": "none",
    "optimizer": "adamw_8bit", "schedule": "none", "model": "char_gpt", "logger": "mlflow", "launch": "local",
}  # fmt: skip
COMMAND = ["stabletrain", "train", "char_gpt", "logger.tracking_uri=https://me:secret@host", "a=b c"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("stabletrain.tracking.record.packages", dict)
    folder = tmp_path / "run"
    folder.mkdir()
    return {
        "recipe": "char_gpt",
        "seed": 7,
        "run_dir": str(folder),
        "resume": None,
        "model": {"_target_": "stabletrain.workloads.CharGPT"},
        "data": {"_target_": "stabletrain.workloads.ShakespeareData"},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
        "schedule": None,
        "trainer": {"max_steps": 60, "max_epochs": None},
        "logger": {"_target_": "stabletrain.tracking.MLflowLogger", "run_id": None, "experiment": "demo"},
        "launch": {"kind": "local", "processes": 2, "nodes": 1},
        "choices": CHOICES,
    }


def record(folder: Path, *steps: tuple[float, int]) -> None:
    file = StepsFile(folder / "steps.bin")
    for i, (loss, flags) in enumerate(steps):
        file.append(i, loss, 1.0, Flag.RECORDED | flags)
    file.close()


def test_a_run_from_start_to_end(uri: str, client: Any, config: dict[str, Any]) -> None:
    """Bugs: an option is no parameter, or two have one name; a resume replaces what a person wrote, or the first end;
    the outcome is missing; a password of the command line is in the store; a run that goes on has the outcome of its
    first end; the description says it is in progress although the run has ended; an existing experiment's description
    is overwritten."""
    open_run(config, uri, command=COMMAND)
    run_id = config["logger"]["run_id"]
    run = client.get_run(run_id)
    params, tags = run.data.params, run.data.tags
    expected = {"clip": "zscore", "spike": "rollback", "outliers": "none", "optimizer": "adamw_8bit"}
    expected |= {"plugins/optimizer": "swap", "schedule": "none", "optimizer.lr": "0.001"}
    assert expected.items() <= params.items()
    assert not {"logger", "launch"} & params.keys()
    assert not [key for key in tags if key.startswith("changed.")]
    assert tags["mlflow.source.name"] == "stabletrain train char_gpt logger.tracking_uri=https://host 'a=b c'"
    assert (tags["mlflow.source.type"], tags["mlflow.user"]) == ("LOCAL", getpass.getuser())
    note = tags[NOTE]
    for words in ("`CharGPT` on `ShakespeareData`", "clip=zscore, spike=rollback", "adamw_8bit, lr 0.001", "steps 60"):
        assert words in note
    assert "secret" not in note
    experiment = client.get_experiment(run.info.experiment_id)
    assert "`steps.bin`" in experiment.tags[NOTE]

    record(Path(config["run_dir"]), *[(2.0, 0)] * 50, (math.nan, Flag.SKIPPED), (4.0, 0))
    client.set_tag(run_id, NOTE, f"Look at this one!\n\n{note}")
    client.set_experiment_tag(run.info.experiment_id, NOTE, "mine")
    ended = Result(end="terminated", message="a | b\nc", steps=50, seconds=5.0, metrics={"throughput/step_s": 0.1})
    assert finish_run(config, ended) is None
    tags = client.get_run(run_id).data.tags
    assert tags[OUTCOME] == "killed"
    assert tags[NOTE].startswith("Look at this one!")
    assert RUNNING not in tags[NOTE]
    assert "**terminated after 50 steps, 5 s; killed: a \\| b c**" in tags[NOTE]
    assert "| 2.04 | 1 of 52 | 0.1 |" in tags[NOTE]
    assert {each.path for each in client.list_artifacts(run_id)} >= {"steps.bin"}

    open_run(config, uri, command=COMMAND)
    assert config["logger"]["run_id"] == run_id
    resumed = client.get_run(run_id).data.tags
    assert resumed[NOTE] == f"{tags[NOTE]}\n\n{RUNNING}"
    assert OUTCOME not in resumed
    assert client.get_experiment(run.info.experiment_id).tags[NOTE] == "mine"


@pytest.mark.parametrize("steps", [(), ((math.nan, Flag.NO_LOSS | Flag.SKIPPED),)])
def test_numbers_of_a_run_without_any(tmp_path: Path, steps: Any) -> None:
    """Bugs: a run that ended before its first step, or without one applied, has no end in MLflow; a damaged record."""
    assert numbers_of_end(tmp_path, Result(end="failed")) == {}
    record(tmp_path, *steps)
    loss = numbers_of_end(tmp_path, Result(end="failed", metrics={"val/loss": math.inf}))
    assert loss.get("val/loss") == "inf"
    assert all("nan" in value for key, value in numbers_of_end(tmp_path, Result(end="failed")).items() if "loss" in key)
    (tmp_path / "steps.bin").unlink()
    (tmp_path / "steps.bin").mkdir()
    assert numbers_of_end(tmp_path, Result(end="failed", steps=2, seconds=1.0)) == {}


@pytest.mark.parametrize("end", [each for each in get_args(End) if each != "finished"])
def test_the_outcome_of_a_run_that_did_not_finish(tmp_path: Path, end: End) -> None:
    """Bug: a run without a record has no outcome."""
    word = outcome_tag.outcome_of(tmp_path, Result(end=end))
    assert word in ("stopped", "killed", "failed")


def test_texts_from_elsewhere_stay_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a backtick or a pipe of a name breaks the table; a config with nothing in it; no user."""
    odd = {"recipe": "a`b|c\nd", "seed": 1, "model": {"_target_": "mine.N|et"}, "choices": None}
    note = note_at_start(odd, ["x|y"])
    assert note.splitlines()[0] == "`N\\|et` of the recipe `a'b\\|c d`, seed 1"
    assert note_at_start({}).endswith(RUNNING)
    assert note_at_end("", "failed", {}) == "**failed**"

    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert "mlflow.user" not in source_tags(["a"])
