"""`stabletrain report` and what it reads: every step of a run's folder, and the sampled metrics of any run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from stabletrain.cli.recorded import read
from stabletrain.cli.report import read_report, report
from stabletrain.cli.report_page import write_report
from stabletrain.cli.summary import finding, summarize
from stabletrain.core.events import Event
from stabletrain.errors import UserError
from stabletrain.launch.launcher import FinishedJob
from stabletrain.launch.outcome_tag import outcome_of
from stabletrain.launch.recorded_run import find_run
from stabletrain.launch.result import Result
from stabletrain.launch.run_series import series_of_run
from stabletrain.runtime.records.steps_file import StepsFile
from stabletrain.tracking.runs import create_run

RECORDED, SKIPPED, OVERFLOW, CLIPPED, NO_LOSS = 1, 2, 4, 8, 16


def a_folder(folder: Path, losses: list[float], flags: dict[int, int] | None = None, **config: object) -> Path:
    """The folder of a run with these losses."""
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump({"logger": None, **config}))
    file = StepsFile(folder / "steps.bin")
    for step, loss in enumerate(losses):
        file.append(step, loss, 1.0 + step % 3, RECORDED | (flags or {}).get(step, 0))
    file.close()
    return folder


def healthy(steps: int) -> list[float]:
    rng = np.random.default_rng(0)
    return list(1.5 + 2.5 * np.exp(-np.arange(steps) / (steps / 6)) + rng.normal(0, 0.05, steps))


def log(client, run_id: str, name: str, values: dict[int, float]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(name, value, 0, step) for step, value in values.items()])


def test_a_folder_with_every_step(tmp_path, monkeypatch):
    """Bugs: flags are read wrongly; a rollback that a resume has discarded counts; events of any content reach the
    terminal; interventions are listed without end; a folder needs a store; a store is made to look for a run."""
    monkeypatch.chdir(tmp_path)
    losses = healthy(600)
    losses[300:320], losses[590:] = [9.0] * 20, [math.nan] * 10
    flags = {**dict.fromkeys(range(300, 320), SKIPPED), 40: CLIPPED, 50: OVERFLOW, 60: NO_LOSS | SKIPPED}
    clip = {"_target_": "stabletrain.ClipNorm", "max_norm": 2.0, "name": None}
    folder = a_folder(tmp_path / "run", losses, flags, plugins={"clip": clip, "spike": None})
    skips = [Event(step, "skip_outliers", "skip", 9.0, 3.0, f"loss 9 > 3\x1b[2J {step}") for step in range(300, 340)]
    spike = Event(298, "rollback", "spike", 9.0, 3.0, "loss 9 > 3, step 1 of the excursion")
    made = [
        spike,
        spike,
        *skips,
        Event(350, "rollback", "rollback", 20.0, math.nan, "back to the snapshot of step 330"),
    ]
    (folder / "events.jsonl").write_text("".join(event.to_json() + "\n" for event in made) + "[]\n")
    actions = [
        {"action": "rollback", "step": 350, "to": 330, "excluded": [[0, 1], [0, 2]]},
        {"action": "rollback", "step": 500, "to": 480, "excluded": [[0, 2]]},
        {"action": "resume", "step": 400},
        {"action": "rollback", "step": "x", "to": [], "excluded": 3},
        {"action": "rollback", "step": 550, "to": None, "excluded": "none"},
    ]
    (folder / "interventions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in actions) + "half a l")
    Result(end="finished").write(folder)

    series = series_of_run(find_run(str(folder), command="report"))
    counts = [int(each.sum()) for each in (series.skipped, series.clipped, series.overflow, series.without_loss)]
    assert counts == [21, 1, 1, 1]
    assert [(each.step, each.to, len(each.excluded)) for each in series.rollbacks] == [(350, 330, 2), (550, None, 0)]
    assert (series.bound, series.clips_tensors, series.spikes, series.every) == (2.0, False, [298, 298], 1)

    text = report(str(folder))
    assert text.startswith("run: FINISHED, diverged\n")
    assert "600 attempted, from steps.bin" in text
    assert "1. diverged: the loss is not finite from step 590 on" in text
    assert "source: Wortsman et al. 2023" in text
    assert "clipped 0.2%, skipped 21, overflows 1, rollbacks 2 (2 batches left out)" in text
    assert text.count("  skip  ") == 30
    assert "and 11 more, up to step 350 (events.jsonl): 10 x skip, 1 x rollback" in text
    assert "1 x spike, the first at step 298: loss 9 > 3" in text
    assert "\x1b" not in text
    assert outcome_of(folder, Result(end="finished")) == "diverged"
    assert outcome_of(folder, Result(end="terminated")) == "killed"
    assert finding(folder).startswith("diverged: the loss is not finite from step 590 on; try: a third")
    config = {"run_dir": str(folder), "logger": None, "trust": []}
    job = FinishedJob(recipe="demo", overrides=(), config=config, result=Result(end="finished", steps=600))
    (line,) = [line for line in summarize([job]).splitlines() if "diverged" in line]
    assert line == f"  {finding(folder)}"
    assert f"(stabletrain report {folder})" in line
    assert list(tmp_path.iterdir()) == [folder]

    pairs = read(str(folder))
    assert len(pairs.pairs) == 598
    assert pairs.pairs[0] == (losses[0], 1.0)
    assert "2 steps that rules do not see are left out" in pairs.note


def test_the_page_of_a_report(tmp_path):
    """Bugs: the page lacks findings or interventions; what a run has recorded becomes part of the page's markup."""
    losses = healthy(300)
    losses[250:] = [6.0] * 50
    folder = a_folder(tmp_path / "a<script>alert(1)<", losses)
    event = Event(260, "rollback", "stop", 2.0, math.nan, "</script><script>alert(2)</script>")
    (folder / "events.jsonl").write_text(event.to_json() + "\n")
    write_report(tmp_path / "page.html", read_report(str(folder)))
    page = (tmp_path / "page.html").read_text()
    assert "Findings" in page
    assert "a third of the learning rate" in page
    assert "Interventions" in page
    assert "<script>alert" not in page
    write_report(tmp_path / "short.html", read_report(str(a_folder(tmp_path / "short", losses[:50]))))
    assert "no findings: 50 steps are recorded" in (tmp_path / "short.html").read_text()


def test_damaged_records_change_no_end_of_a_run(tmp_path):
    """Bug: a file that somebody has damaged, or that is missing, ends `train` with a traceback."""
    folder = tmp_path / "run"
    assert finding(folder) is None
    assert outcome_of(folder, Result(end="finished")) is None
    assert outcome_of(folder, Result(end="failed")) == "failed"
    a_folder(folder, healthy(120))
    assert finding(folder) is None
    assert outcome_of(folder, Result(end="finished")) == "healthy"
    for name, content in (
        ("events.jsonl", b'{"step": "x"}\n\xff\xfe'),
        ("interventions.jsonl", b'{"step": NaN}\n[1]\n'),
    ):
        (folder / name).write_bytes(content)
    (folder / "steps.bin").write_bytes((folder / "steps.bin").read_bytes()[:-5])
    assert outcome_of(folder, Result(end="finished")) == "healthy"
    (folder / "run.yaml").write_text("a: [")
    (folder / "steps.bin").unlink()
    (folder / "steps.bin").mkdir()
    assert finding(folder) is None
    assert outcome_of(folder, Result(end="finished")) is None


def test_sampled_metrics_of_our_own(uri, client):
    """Bugs: a count since the start is taken for one of each point; 30 means of ten steps are too few for a run of 300
    steps; the learning rate is at other steps; old names are not read."""
    run_id = create_run(uri, "demo", name="sampled")
    at = list(range(9, 600, 10))
    log(client, run_id, "stability/loss", dict(zip(at, healthy(60), strict=True)))
    log(client, run_id, "stability/grad_norm", dict.fromkeys(at, 1.0))
    log(client, run_id, "stability/lr", dict.fromkeys([at[0], at[-1]], 0.1))
    log(client, run_id, "stability/clipped_share", dict.fromkeys(at, 0.7))
    log(client, run_id, "stability/skipped", {step: 0.0 if step < 300 else 8.0 for step in at})
    log(client, run_id, "val/loss", {99: 3.0, 199: 2.0, 299: 1.5, 399: 1.7, 499: 1.9, 599: 2.2})
    for number in range(5):
        log(client, run_id, f"stability_layers/grad_norm/net.blocks.{number}", {9: 10.0**number * 1e-4, 19: 1.0})
        log(client, run_id, f"stability_layers/grad_norm/net.blocks.{number}", {29: 10.0**number * 1e-4})
    series = series_of_run(find_run("sampled", command="report", uri=uri))
    assert (series.steps, series.every, len(series.step)) == (600, 10, 60)
    assert (series.skipped.sum(), series.skipped.max()) == (8.0, 8.0)
    assert series.clipped.sum() == pytest.approx(420)
    assert series.lr.tolist() == pytest.approx([0.1] * 60)
    assert [layer.name for layer in series.layers] == [f"net.blocks.{number}" for number in range(5)]
    text = report("sampled")
    assert "60 values of stability/loss, one for each 10 steps" in text
    assert "1. vanishing: the gradient of net.blocks.0 is 1.0e-04 of that of net.blocks.4" in text
    assert "2. overfitting: validation ends 47% above its best, 1.5 at step 299" in text
    assert "3. skips in one place: 8 of 8 dropped steps are steps 300 to 309" in text
    assert "findings, the worst 3 of 5 (hints, no diagnosis):" in text


def test_runs_of_other_tools(uri, client):
    """Bugs: a run with other names of metrics has no findings; what has no training loss, or one of NaN only, ends in
    a traceback, or is called healthy; a validation loss is taken for the training loss."""
    other = create_run(uri, "demo", name="other")
    steps = [*range(0, 2000, 50)]
    log(client, other, "Loss/train", {step: 4.0 - step / 1000 if step < 1500 else 4.5 for step in steps})
    log(client, other, "val_loss", dict.fromkeys(steps[::8], 9.0))
    text = report("other")
    assert "40 values of Loss/train, one for each 50 steps" in text
    assert "1. diverged: the loss ends at 4.5, its best was 2.55 at step 1450" in text
    assert "9 lowest" in text

    short = create_run(uri, "demo", name="short")
    log(client, short, "train_loss", dict.fromkeys(range(12), 1.0))
    assert "no findings: 12 steps are recorded, and at least 100 are needed" in report("short")

    for name, metrics in {
        "nan": {"train_loss": math.nan},
        "none": {"val/loss": 1.0, "accuracy": 0.5},
        "bare": {},
    }.items():
        run_id = create_run(uri, "demo", name=name)
        for metric, value in metrics.items():
            log(client, run_id, metric, dict.fromkeys(range(200), value))
    with pytest.raises(
        UserError, match=r"report: nan has no finite training loss: the metric train_loss has 200 values"
    ):
        report("nan")
    with pytest.raises(
        UserError, match=r"report: none has no training loss; expected steps.bin.*got accuracy, val/loss"
    ):
        report("none")
    with pytest.raises(UserError, match=r"bare has no training loss; .* got no metrics"):
        report("bare")
    with pytest.raises(UserError, match=r"report: there is no run othre .*did you mean 'other'"):
        report("othre")


def test_replay_reads_every_step_before_the_metrics(uri, client, tmp_path):
    """Bugs: means of ten steps are replayed although each step is there; a name with a dot is taken for a file."""
    run_id = create_run(uri, "demo", name="optimizer.lr=0.01")
    folder = a_folder(tmp_path / "run", [2.0, math.nan, 1.0])
    log(client, run_id, "stability/loss", {9: 5.0})
    log(client, run_id, "stability/grad_norm", {9: 1.0})
    for source in (run_id, run_id[:8], "optimizer.lr=0.01"):
        assert read(source).pairs == [(5.0, 1.0)]
    client.log_artifact(run_id, str(folder / "steps.bin"))
    for source in (run_id, "optimizer.lr=0.01"):
        assert repr(read(source).pairs) == repr([(2.0, 1.0), (math.nan, 2.0), (1.0, 3.0)])
    with pytest.raises(UserError, match=r"replay: missing\.csv cannot be read"):
        read("missing.csv")
    with pytest.raises(UserError, match=r"replay: there is no file and no run missing in"):
        read("missing")
    file = StepsFile(tmp_path / "run" / "steps.bin")
    for step in range(3):
        file.append(step, math.nan, 1.0, RECORDED | NO_LOSS)
    file.close()
    with pytest.raises(UserError, match="expected steps with a loss"):
        read(str(folder))
