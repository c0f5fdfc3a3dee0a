"""`stabletrain compare`: runs from the store and from folders, tables, page, messages."""

import json
import math
import re

import pytest
import yaml
from mlflow.entities import Metric
from recorded_runs import Run
from typer.testing import CliRunner

from stabletrain.cli.comparing import aligned, mlflow_address, tables
from stabletrain.cli.main import app
from stabletrain.errors import UserError
from stabletrain.launch.compared_run import ComparedRun
from stabletrain.launch.comparing import Compared, compare_recorded, find, write_comparison
from stabletrain.launch.recorded_run import RecordedRun
from stabletrain.tracking.runs import create_run, set_final_status, write_params

HOSTILE = "</script><script>alert(1)</script>"
CLIP = {"plugins": {"clip": {"_target_": "stabletrain.ClipNorm", "max_norm": 1.0}}}


@pytest.fixture
def four(uri, tmp_path, monkeypatch):
    """Two ways to clip with two seeds each, of which one is clipped, spikes and skips; the ids of the runs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    parent = create_run(uri, "demo", name="sweep", tags={"stabletrain.sweep": "true"})
    ids = [parent]
    for place, (clip, seed) in enumerate((clip, seed) for clip in ("none", "norm") for seed in (0, 1)):
        run = Run(400, seed=place)
        if clip == "norm":
            run.clip(slice(0, 100))
        if place == 0:
            run.skip(10)
            run.spike(300, 5)
            run.metrics = {"throughput/tokens_per_s": 1200.0, "throughput/peak_memory_mib": 2048.0}
        config = {
            "choices": {"plugins/clip": clip},
            "seed": seed,
            **(CLIP if clip == "norm" else {"plugins": {"clip": None}}),
        }
        tags = {"mlflow.parentRunId": parent, **({"stabletrain.outcome": "spiked"} if place == 3 else {})}
        ids.append(
            run.record(
                uri, tmp_path / "runs" / str(place), experiment="demo", name=f"{clip} {seed}", params=config, tags=tags
            )
        )
    return ids


def test_the_table(four, tmp_path):
    """Bugs: exact counts are not those of steps.bin; the outcome's tag is not read; a sweep's run is a column, or does
    not stand for its jobs; folders and ids of the same runs give two columns; a run whose folder is gone is read from
    nowhere; the page lacks a curve or the clipped steps, or does not colour by variant."""
    compared = compare_recorded(find([four[0], str(tmp_path / "runs" / "0")]))
    lines = {line.split("  ")[0]: line.split()[1:] for line in tables(compared).splitlines() if line}
    assert lines["clip"] == ["none", "none", "norm", "norm"]
    assert "plugins.clip.max_norm" not in lines
    assert lines["outcome"] == ["rolled_back", "healthy", "healthy", "spiked"]
    assert lines["skipped"] == ["1", "0", "0", "0"]
    assert lines["spikes"] == ["1", "0", "0", "0"]
    assert lines["rollbacks"] == ["1", "0", "0", "0"]
    assert lines["tokens/s"] == ["1,200", "-", "-", "-"]
    assert lines["peak memory"] == ["memory", "2", "GiB", "-", "-", "-"]
    assert [lines["clipped"][i] for i in (0, 2, 4, 6)] == ["0", "0", "25", "25"]
    address = mlflow_address(compared)
    assert address is not None
    assert all(run in address for run in four[1:])
    assert [each.run.run_id for each in compared.runs] == four[1:]

    exact = [run.measures for run in compared.summaries]
    (tmp_path / "runs").rename(tmp_path / "away")
    again = compare_recorded(find([], experiment="demo"))
    assert [each.run.folder for each in again.runs] == [None] * 4
    assert [run.measures for run in again.summaries] == exact
    seeds = tables(again, seeds=True, equal=True)
    assert "clip=none  2  0, 1   rolled_back, healthy" in seeds
    assert "recipe" not in seeds
    filtered = find([], experiment="demo", query="params.seed = '1'", limit=1)
    assert [run.name for run in filtered] == ["norm 1"]

    file = tmp_path / "page.html"
    write_comparison(file, compared, seeds=True)
    data = json.loads(re.search(r'id="data">(.*?)</script>', file.read_text())[1])
    assert [run["group"] for run in data["runs"]] == ["clip=none", "clip=none", "clip=norm", "clip=norm"]
    assert {*data["runs"][0]["curves"]} == {"loss", "grad_norm", "lr"}
    assert [mark["kind"] for mark in data["runs"][0]["marks"]] == ["rollback", "spike", "skip"]
    assert [mark["kind"] for mark in data["runs"][2]["marks"]] == ["clip"]


def test_a_run_without_a_record_of_its_steps(uri, tmp_path):
    """Bug: of a run before steps.bin existed, or that was killed before it was sent, the counts are zero or missing."""
    run = Run(400)
    run.skip(10)
    run.spike(300, 5)
    run.clip(slice(0, 100))
    folder = tmp_path / "run"
    run.record(uri, folder, experiment="demo", name="old", params={}, artifacts=False)
    (folder / "steps.bin").unlink()
    (compared,) = compare_recorded(find([str(folder)])).summaries
    exact = {"skipped": 1, "overflows": 0, "rollbacks": 1, "batches_excluded": 0, "clipped_share": 0.25, "spikes": 1}
    assert {key: compared.measures[key] for key in exact} == exact
    assert compared.outcome == "rolled_back"


def test_runs_of_other_tools(uri, client, tmp_path, monkeypatch):
    """Bugs: a run without run.yaml, steps.bin or our metrics is an error, or looks as if nothing had been skipped; a
    metric of NaN only is missing or an error; one name for two runs; a name that is HTML, or that controls the
    terminal, does so."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    ids = [create_run(uri, "other", name=name) for name in (HOSTILE, HOSTILE, "empty\x1b[31m")]
    write_params(client, ids[0], {"lr": 0.1})
    for run_id, name, values in (
        (ids[0], "train_loss", [2.0 - step / 100 for step in range(100)]),
        (ids[0], "val_loss", [3.0, 2.5, math.nan]),
        (ids[1], "loss", [math.nan] * 100),
    ):
        client.log_batch(run_id, [Metric(name, value, 0, step) for step, value in enumerate(values)])
    for run_id in ids:
        set_final_status(uri, run_id, "FINISHED")
    compared = compare_recorded(find(ids))
    text = tables(compared)
    lines = {line.split("  ")[0]: line.split()[1:] for line in text.splitlines() if line}
    assert lines["outcome"] == ["healthy", "diverged", "finished"]
    assert lines["final loss"] == ["loss", "1.055", "nan", "-"]
    assert lines["val loss"] == ["loss", "nan", "-", "-"]
    assert lines["best val loss"] == ["val", "loss", "2.5", "-", "-"]
    assert "skipped" not in lines
    assert "\x1b" not in text
    assert f"({ids[1][:6]})" in compared.summaries[1].name
    assert "the metric train_loss" in text
    write_comparison(tmp_path / "page.html", compared)
    assert "<script>alert" not in (tmp_path / "page.html").read_text()


def test_folders_without_a_store(four, tmp_path):
    """Bugs: runs with logger=none have no parameters to differ in, or are not comparable with those of a store; the
    command needs a store for them."""
    folders = [tmp_path / "runs" / str(place) for place in (0, 2)]
    for folder in folders:
        config = yaml.safe_load((folder / "run.yaml").read_text())
        (folder / "run.yaml").write_text(yaml.safe_dump({**config, "logger": None, "run_dir": str(folder)}))
    compared = compare_recorded(find([*map(str, folders), four[3]]))
    assert dict(compared.params) == {"clip": ("none", "norm", "norm")}
    assert compared.summaries[1].measures["clipped_share"] == compared.summaries[2].measures["clipped_share"] == 0.25
    assert mlflow_address(compared) is None


def test_mistakes(uri, monkeypatch):
    """Bug: a mistake gives a traceback or an empty table."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    create_run(uri, "demo")
    for words, options, message in (
        ([], {}, "got neither"),
        (["x"], {"experiment": "demo"}, "got both"),
        (["x"], {"query": "a"}, "add --experiment"),
        ([], {"experiment": "demo", "limit": 0}, "--limit must be >= 1"),
        ([], {"experiment": "demo", "query": "params.seed = '7'"}, "has no runs that fit"),
        ([], {"experiment": "demoo"}, "no experiment 'demoo'"),
        (["nothing"], {}, "there is no run nothing"),
    ):
        with pytest.raises(UserError, match=message):
            find(words, **options)


def test_no_store(tmp_path, monkeypatch):
    """Bug: looking for a run in a folder without a database makes one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UserError, match="there is no tracking store"):
        find(["one"])
    assert not list(tmp_path.iterdir())


def test_the_command(four, tmp_path):
    """Bugs: an option does not reach the function; a mistake is a traceback, or exit code 0 or 1."""
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["compare", four[1], "norm 0", "--html", str(page), "--metrics", "stability/lr"])
    assert done.exit_code == 0, done.output
    assert "stability/lr" in done.stdout
    assert f"page:    {page}" in done.stdout
    assert "2 runs compared" in page.read_text()
    done = CliRunner().invoke(app, ["compare", "--experiment", "demo", "--limit", "2"])
    assert "these are the newest 2 runs" in done.stdout
    for words in (["compare"], ["compare", "norm"], ["compare", four[1], "--html", str(tmp_path)]):
        done = CliRunner().invoke(app, words)
        assert (done.exit_code, done.stderr.startswith("error: ")) == (2, True), done.output
        assert "Traceback" not in done.output


def test_the_address_has_no_password():
    """Bug: the password of a tracking server is printed."""
    runs = [
        RecordedRun(run_id=i, uri="https://me:secret@x.org/m", name=i, experiment_id="1", status="RUNNING")
        for i in "ab"
    ]
    address = mlflow_address(Compared(runs=[ComparedRun(run=run) for run in runs]))
    assert address is not None
    assert address.startswith("https://x.org/m/#/compare-runs?")


def test_alignment():
    """Bug: a long name pushes all columns away, a line break in a name breaks the table."""
    assert aligned([["a\nb", "1"], ["x" * 100, "2"]]) == f"a b{' ' * 29}  1\n{'x' * 31}…  2"
