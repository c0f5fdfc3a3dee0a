"""Finding a recorded run, and reading its files from its folder or from the store."""

from pathlib import Path

import pytest
import yaml

from stabletrain.core.events import Event
from stabletrain.errors import UserError
from stabletrain.launch.recorded_run import find_run, find_runs
from stabletrain.launch.result import Result
from stabletrain.runtime.records.steps_file import StepsFile
from stabletrain.tracking.ownership import RUN_DIR
from stabletrain.tracking.runs import create_run, write_params


def of(wanted: str, uri: str):
    return find_run(wanted, command="report", uri=uri)


def test_a_run_is_found_by_what_fits_one(uri, client):
    """Bugs: a prefix or name that fits two gives the first; a name with a quote breaks the search; a name that looks
    like an id is not found; a wrong word gives a traceback."""
    ids = [create_run(uri, "demo", name=name) for name in ("one", "two", "two", "it's", "beef")]
    assert of(ids[0], uri).name == "one"
    assert of(ids[0][:12], uri).run_id == ids[0]
    assert of("one", uri).run_id == ids[0]
    assert of("it's", uri).run_id == ids[3]
    assert of("beef", uri).run_id == ids[4]
    with pytest.raises(UserError, match=rf"(?s)two fits 2 runs; name one by its id:.*({ids[1]}|{ids[2]})  two  demo"):
        of("two", uri)
    with pytest.raises(UserError, match=r"no run onne in .*did you mean 'one'\?"):
        of("onne", uri)
    with pytest.raises(UserError, match=r"no run \"'\"' in"):
        of("\"'\"'", uri)
    with pytest.raises(UserError, match="no folder runs/x"):
        of("runs/x", uri)
    assert {run.run_id for run in find_runs(command="compare", experiment="demo", uri=uri)} == set(ids)
    named = find_runs(command="compare", experiment="demo", query="attributes.run_name = 'two'", uri=uri)
    assert len(named) == 2
    with pytest.raises(UserError, match="filter 'nonsense' is wrong"):
        find_runs(command="compare", experiment="demo", query="nonsense", uri=uri)
    with pytest.raises(UserError, match=r"no experiment 'x'.*demo"):
        find_runs(command="compare", experiment="x", uri=uri)


def test_what_a_run_has_recorded(uri, client, tmp_path):
    """Bugs: old names of metrics are not found; the newest part of a resumed run is not the one that is read; a run's
    folder that a store names is read although it is another run's; a missing file is an error."""
    run_id = create_run(uri, "demo", name="one")
    write_params(client, run_id, {"seed": 3})
    for name in ("loss", "clipped", "skipped"):
        client.log_metric(run_id, name, 2.0, step=0)
    for step, value in ((9, 3.0), (9, 1.5), (19, 1.0)):
        client.log_metric(run_id, "loss", value, step=step)
    event = Event(3, "clip", "skip", float("inf"), 1.0, "norm inf > 1")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, number in ((first, 1), (second, 2)):
        folder.mkdir()
        (folder / "run.yaml").write_text(f"number: {number}\n")
        (folder / "events.jsonl").write_text(event.to_json() + '\nno event\n{"step": 1}\n')
    client.log_artifacts(run_id, str(first))
    client.log_artifact(run_id, str(second / "run.yaml"), "resume-2")
    client.log_artifact(run_id, str(second / "run.yaml"), "resume-10")
    run = of(run_id, uri)
    assert (run.experiment, run.status, run.params["seed"]) == ("demo", "RUNNING", "3")
    assert run.metrics["stability/loss"] == 1.0
    assert run.history("stability/loss") == run.history("loss") == [(0, 2.0), (9, 1.5), (19, 1.0)]
    assert run.history("absent") == []
    assert run.segments() == ["", "resume-2", "resume-10"]
    assert run.config() == {"number": 2}
    assert run.config("") == {"number": 1}
    assert [each._replace(reason="") for each in run.events()] == [event._replace(reason="")]
    assert run.steps() is None
    assert run.file("environment/code.json") is None

    other = tmp_path / "other"  # a folder of this name on this machine, of another run
    other.mkdir()
    (other / "run.yaml").write_text("logger: {run_id: feed}\n")
    client.set_tag(run_id, RUN_DIR, str(other))
    assert of(run_id, uri).folder is None
    (other / "run.yaml").write_text(yaml.safe_dump({"logger": {"run_id": run_id, "tracking_uri": uri}, "number": 7}))
    assert of(run_id, uri).folder == other
    assert of(str(other), uri).run_id == run_id
    assert of(str(other), uri).config()["number"] == 7


def test_a_folder_does_not_choose_which_store_is_asked(uri, tmp_path, monkeypatch):
    """Bug: a run's folder from elsewhere gets the user's credentials for its own server, or has a database opened."""
    from stabletrain.launch import recorded_run

    asked = []
    monkeypatch.setattr(recorded_run, "_ready", lambda named: asked.append(named) or named)
    folder = tmp_path / "run"
    folder.mkdir()
    for theirs in ("http://127.0.0.1:9", f"sqlite:///{tmp_path}/theirs.db"):
        (folder / "run.yaml").write_text(yaml.safe_dump({"logger": {"run_id": "feed", "tracking_uri": theirs}}))
        assert of(str(folder), uri).run_id is None
    assert asked == []


def test_a_folder_without_a_store(uri, tmp_path):
    """Bugs: a run with logger=none cannot be read; a store that is gone makes the folder unreadable."""
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(UserError, match=r"not the folder of a run: it has no run.yaml"):
        of(str(folder), uri)
    node = {"run_id": "feed", "tracking_uri": f"sqlite:///{tmp_path}/gone/mlflow.db"}
    for logger in (None, node, {"run_id": "feed", "tracking_uri": uri}):
        (folder / "run.yaml").write_text(yaml.safe_dump({"logger": logger}))
        run = of(str(folder), uri)
        assert (run.run_id, run.status, run.steps(), run.events()) == (None, "UNKNOWN", None, [])
    Result(end="killed", metrics={"loss": 1.0}).write(folder)
    file = StepsFile(Path(folder) / "steps.bin")
    file.append(0, 2.5, 1.5, 1)
    file.close()
    run = of(str(folder), uri)
    assert run.status == "KILLED"
    assert run.steps().loss.tolist() == [2.5]
    assert not (tmp_path / "gone").exists()
