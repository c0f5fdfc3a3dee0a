"""From a recorded run to the jobs that run it again; nothing is trained here."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from stabletrain.config.problems import ConfigError
from stabletrain.errors import UserError
from stabletrain.launch.bounded import write_json
from stabletrain.launch.original import restore_commands
from stabletrain.launch.recorded_run import find_run
from stabletrain.launch.reproduce import Part, ReproduceReporter, plan, reproduce
from stabletrain.launch.result import Result
from stabletrain.launch.run_again import add_end, changed, fresh_logger, job_of, same_config
from stabletrain.launch.segments import Segment
from stabletrain.runtime.records.steps_file import StepsFile
from stabletrain.tracking.ownership import RUN_DIR
from stabletrain.tracking.runs import create_run

CONFIG: dict[str, Any] = {
    "recipe": "tiny", "seed": 0, "run_dir": None, "resume": None,
    "model": {"_target_": "mine.Model"}, "data": {"_target_": "mine.Data"}, "optimizer": None, "schedule": None,
    "plugins": {}, "callbacks": {}, "guard": None, "precision": None, "strategy": None, "logger": None,
    "trainer": {"max_steps": 30, "devices": 1, "num_nodes": 1},
    "launch": {"kind": "local", "processes": 1, "nodes": 1, "threads": 1},
    "trust": [], "typed": [], "choices": {},
}  # fmt: skip
MLFLOW = {"_target_": "stabletrain.tracking.MLflowLogger", "tracking_uri": "http://elsewhere", "run_id": "1", "more": 2}


@pytest.fixture
def config() -> dict[str, Any]:
    return copy.deepcopy(CONFIG)


def job(config: dict[str, Any], *changes: str) -> Any:
    found = same_config(config, "it")
    changed(found, changes)
    return job_of(found, {"plugins/clip": "zscore", "odd": 3}, changes, tags={}, command=(), resume=None)


def test_what_names_the_old_run_is_made_fresh(config, tmp_path):
    """Bugs: the repeat writes to the old run's folder, its run or its tracker; resumes from its checkpoint; a repeat of
    a repeat ends where the first one did; run.yaml itself says what is trusted or was typed."""
    config |= {"resume": str(tmp_path), "trust": ["evil"], "typed": ["run_dir"], "logger": dict(MLFLOW)}
    repeat = same_config(config, "it")
    add_end(repeat, 5, save=True)
    again = same_config({**repeat, "trust": []}, "it")
    assert again == same_config(config, "it")
    assert "reproduce_end" not in again["callbacks"]
    composed = job({**config, "logger": None}).composed
    assert composed.config["run_dir"] is composed.config["resume"] is None
    assert not {"trust", "typed", "choices"} & composed.config.keys()
    assert composed.choices == {"plugins/clip": "zscore"}
    assert composed.overrides == ()
    fresh = fresh_logger(config, "experiment", tracked=True)
    assert fresh == {
        "_target_": MLFLOW["_target_"], "tracking_uri": None, "run_id": None, "more": 2, "experiment": "experiment"
    }  # fmt: skip
    assert "Dummy" in fresh_logger(config, "", tracked=False)["_target_"]
    assert fresh_logger({"logger": None}, "", tracked=False) is None
    old = {key: config[key] for key in ("recipe", "seed", "model", "data", "trainer", "launch")}
    assert job({**old, "logger": None}).composed.config["callbacks"] == {}  # of an earlier version


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("model", None, "lacks model"),
        ("recipe", "../../up", "expected a plain name"),
        ("recipe", ".hidden", "expected a plain name"),
        ("recipe", "a\x1b[31m", "expected a plain name"),
        ("trainer", {"max_steps": 3, "devices": 1, "default_root_dir": "/elsewhere"}, "below the run's folder"),
        ("callbacks", {"x": {"_target_": "y", "dirpath": "/elsewhere"}}, "add callbacks.x.dirpath=/elsewhere"),
        ("callbacks", 3, "callbacks: expected"),
        ("guard", {"events": "../e"}, "below the run's folder"),
        ("launch", {"kind": "local", "processes": 1, "nodes": 1, "threads": 0}, "at least 1"),
        ("nonsense", 1, "there is no such key"),
    ],
)
def test_a_config_of_anybody_is_checked(key, value, text, config):
    """Bugs: a run.yaml of a tracker names where files are written, or a folder outside of runs/; a traceback."""
    with pytest.raises((UserError, ConfigError), match=text):
        job({**config, key: value})


def test_values_are_changed_from_the_command_line(config):
    """Bugs: a typed path is refused; a wrong key is set nowhere; processes without devices."""
    found = job(
        config, "launch.threads=2", "launch.processes=2", "trainer.max_steps=7", "optimizer=null"
    ).composed.config
    assert (found["launch"]["threads"], found["trainer"]["devices"], found["trainer"]["max_steps"]) == (2, 2, 7)
    path = {"x": {"_target_": "y", "dirpath": "/elsewhere"}}
    assert job({**config, "callbacks": path}, "callbacks.x.dirpath=/elsewhere").composed.overrides
    for word in ("plugins/clip=none", "~seed", "seed=1,2", "run_dir=x", "resume=x"):
        with pytest.raises(UserError, match=r"expected KEY=VALUE"):
            job(config, word)
    with pytest.raises(UserError, match=r"the run has no luanch; did you mean 'launch'\?"):
        job(config, "luanch.threads=2")
    with pytest.raises(UserError, match="nothing"):
        job(config, "nothing")


def recorded(
    folder: Path, config: dict[str, Any], *, steps: int, end: Any = "finished", resumes: list[int] | None = None
) -> str:
    """The folder of a run, with what it has recorded."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "run_dir": str(folder)}))
    Result(end=end).write(folder)
    file = StepsFile(folder / "steps.bin")
    for step in range(steps):
        file.append(step, 1.0, 1.0, 1)
    file.close()
    if resumes:
        write_json(folder / "resumes.json", resumes)
    return str(folder / "checkpoints")


def planned(folder: Path, *, check: bool = True, steps: int | None = None) -> list[tuple[Any, ...]]:
    parts = plan(find_run(str(folder), command="reproduce"), check=check, steps=steps)
    return [(Path(p.segment.config["run_dir"]).name, p.begin, p.end, p.limit, p.has_next) for p in parts]


def test_a_run_is_repeated_until_its_own_end_or_where_it_was_stopped(config, tmp_path):
    """Bugs: a run that SIGTERM has stopped goes on to max_steps; what raised in the next step is not reached; a
    finished one is cut, so that a repeat that goes on is not seen."""
    for end, limit in (("finished", None), ("terminated", 9), ("killed", 9), ("failed", 10), ("stopped", 10)):
        recorded(tmp_path / end, config, steps=9, end=end)
        assert planned(tmp_path / end) == [(end, 0, None, limit, False)]
        assert planned(tmp_path / end, check=False) == [(end, 0, None, None, False)]
        assert planned(tmp_path / end, steps=4) == [(end, 0, 4, 4, False)]
        assert planned(tmp_path / end, steps=20)[0][3] == (limit or 20)
    cut = {**config, "callbacks": {}}
    add_end(cut, 6, save=False)  # a repeat that --steps has ended
    recorded(tmp_path / "cut", cut, steps=6)
    assert planned(tmp_path / "cut") == [("cut", 0, None, 6, False)]


def test_a_resumed_run_is_repeated_segment_by_segment(config, tmp_path):
    """Bugs: the last segment alone is run, from the original's checkpoint or from new weights; the cuts are those of
    another resume; steps that a kill has made twice are compared twice; a circle of runs never ends."""
    first = recorded(tmp_path / "a", config, steps=9, end="killed")
    second = recorded(tmp_path / "b", {**config, "resume": first}, steps=15, end="terminated", resumes=[6])
    recorded(tmp_path / "c", {**config, "resume": second}, steps=20, resumes=[6, 15])
    whole = [("a", 0, 6, 6, True), ("b", 6, 15, 15, True), ("c", 15, None, None, False)]
    assert planned(tmp_path / "c") == whole
    assert planned(tmp_path / "b") == [whole[0], ("b", 6, None, 15, False)]
    assert planned(tmp_path / "c", steps=15) == [whole[0], ("b", 6, 15, 15, False)]
    assert planned(tmp_path / "c", steps=3) == [("a", 0, 3, 3, False)]
    assert planned(tmp_path / "c", check=False)[:2] == whole[:2]

    (tmp_path / "b" / "resumes.json").unlink()  # of an earlier version: from the checkpoint, as the run itself
    (part,) = plan(find_run(str(tmp_path / "b"), command="reproduce"), check=True, steps=None)
    assert (part.resume, part.begin) == (first, 0)
    elsewhere = str(tmp_path / "gone" / "checkpoints")
    recorded(tmp_path / "d", {**config, "resume": elsewhere}, steps=9, resumes=[4])
    with pytest.raises(UserError, match=r"was resumed from .*gone.*, which is not here"):
        planned(tmp_path / "d")
    mine = recorded(tmp_path / "e", {**config, "resume": str(tmp_path / "e" / "checkpoints")}, steps=9, resumes=[4])
    assert plan(find_run(str(tmp_path / "e"), command="reproduce"), check=True, steps=None)[0].resume == mine


def test_segments_come_from_the_store_alone(uri, client, config, tmp_path):
    """Bugs: a run whose folder is gone cannot be repeated; its first run.yaml is that of the last resume."""
    run_id = create_run(uri, "demo", name="resumed", tags={RUN_DIR: "/gone/b"})
    for name, steps, resumes, folder in (("a", 6, None, None), ("b", 15, [6], "resume-1")):
        resume = "/gone/a/checkpoints/x.ckpt" if resumes else None
        recorded(tmp_path / name, config, steps=steps, resumes=resumes)
        (tmp_path / name / "run.yaml").write_text(
            yaml.safe_dump({**config, "run_dir": f"/gone/{name}", "resume": resume})
        )
        client.log_artifact(run_id, str(tmp_path / name / "run.yaml"), folder)
        client.log_artifact(run_id, str(tmp_path / name / "steps.bin"))
    client.log_artifact(run_id, str(tmp_path / "b" / "resumes.json"))
    client.set_terminated(run_id, "KILLED")
    parts = plan(find_run("resumed", command="reproduce", uri=uri), check=True, steps=None)
    assert [(part.segment.name, part.begin, part.end, part.limit) for part in parts] == [
        ("", 0, 6, 6),
        ("resume-1", 6, None, 15),
    ]


class Silent(ReproduceReporter):
    def begins(self, run: Any, parts: list[Part]) -> None:
        raise AssertionError("nothing may start")


def test_what_cannot_be_reproduced_is_one_message(uri, client, config, tmp_path, monkeypatch):
    """Bugs: a traceback; a run starts although the record lacks what a check needs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    create_run(uri, "demo", name="other", tags={"mlflow.source.name": "train.py"})
    create_run(uri, "demo", name="parent", tags={"stabletrain.sweep": "true"})
    recorded(tmp_path / "no_steps", config, steps=0)
    recorded(tmp_path / "slurm", {**config, "launch": {**config["launch"], "kind": "slurm"}}, steps=3)
    recorded(tmp_path / "odd", {**config, "launch": "x", "callbacks": 3, "logger": [1], "trainer": "y"}, steps=3)
    recorded(tmp_path / "broken", config, steps=3)
    (tmp_path / "broken" / "run.yaml").write_text("model: [")
    for name, text in (
        ("nowhere", "no run nowhere"),
        ("other", r"no run.yaml: it was not started by stabletrain train \(its source: train.py\)"),
        ("parent", "parent of a sweep"),
        (str(tmp_path / "no_steps"), "no steps.bin"),
        (str(tmp_path / "slurm"), "SLURM"),
        (str(tmp_path / "odd"), "launch: expected"),
        (str(tmp_path / "broken"), "expected valid YAML"),
    ):
        with pytest.raises((UserError, ConfigError), match=text):
            reproduce(name, Silent(), check=True)
    with pytest.raises(AssertionError, match="nothing may start"):  # inside an allocation
        reproduce(str(tmp_path / "slurm"), Silent(), check=True, changes=["launch.kind=torchrun"])
    with pytest.raises(UserError, match="--steps: expected at least 1, got 0"):
        reproduce(str(tmp_path / "slurm"), Silent(), steps=0)


def test_commands_that_would_restore_the_original(config, tmp_path):
    """Bugs: a command for what is the same here; a requirements file that names another index; a commit that is an
    option of git."""
    folder = tmp_path / "run"
    recorded(folder, config, steps=1)
    environment, new = folder / "environment", tmp_path / "new"
    environment.mkdir()
    new.mkdir()
    segment = Segment(run=find_run(str(folder), command="reproduce"), name="", config=config)
    assert restore_commands(segment, new, tmp_path) == []
    (environment / "requirements.txt").write_text("--index-url http://evil\npyyaml==0.1\nx @ file:///y\nnumpy==0.1\n")
    sha = "a" * 40
    (environment / "git.json").write_text(f'{{"sha": "{sha}", "diff_truncated": true}}')
    (environment / "git.diff").write_text("+a line\n")
    packages, commit, diff = restore_commands(segment, new, tmp_path)
    assert packages.command == f"pip install -r {new}/original/requirements.txt"
    assert (new / "original" / "requirements.txt").read_text() == "pyyaml==0.1\nnumpy==0.1\n"
    assert "2 packages have another version: numpy 0.1 (here " in packages.reason
    assert commit.command == f"git switch --detach {sha}"
    assert diff.command == f"git apply {new}/original/git.diff"
    assert "of which the end is not recorded" in diff.reason
    (environment / "git.json").write_text('{"sha": "--exec=x"}')
    (environment / "requirements.txt").unlink()
    assert restore_commands(segment, new, tmp_path) == []
