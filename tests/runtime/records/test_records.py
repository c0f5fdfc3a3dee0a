"""Events and metrics: complete, strict, and never the reason why a run dies."""

import csv
import json
import logging
from pathlib import Path

import pytest
from fits import HEALTHY, NAN_LOSS, EventRecorder, Net, Recorder, batches, fit
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from stabletrain import ClipNorm, Guard, SkipNonFinite
from stabletrain.core.events import Event
from stabletrain.runtime.guard.metrics import Counters, MetricsWindow
from stabletrain.runtime.records.event_log import EventLog

ITEMS = batches(HEALTHY, HEALTHY, NAN_LOSS, HEALTHY)


def test_the_event_log_is_strict_json(tmp_path: Path) -> None:
    """Bug: NaN as a bare word; a line for each rank; a file that appears without an event."""
    path = tmp_path / "deep" / "events.jsonl"
    fit(Net(), ITEMS, SkipNonFinite(), Guard(events=path))
    (event,) = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert (event["step"], event["plugin"], event["kind"], event["value"]) == (2, "skip_nonfinite", "nonfinite", "nan")
    healthy = tmp_path / "none.jsonl"
    fit(Net(), ITEMS[:2], SkipNonFinite(), Guard(events=healthy))
    assert not healthy.exists()


@pytest.mark.parametrize("events", ["", "file/events.jsonl"])
def test_a_path_that_cannot_be_written(events: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a full disk or a wrong path that ends the run; a warning at every step."""
    (tmp_path / "file").write_text("in the way")
    recorder = Recorder()
    leader = Guard(events=tmp_path / events)
    with caplog.at_level(logging.WARNING, "stabletrain"):
        fit(Net(), ITEMS, recorder, leader)
    assert len(recorder.state) == 4
    assert caplog.text.count("events cannot be written to") == 1
    assert len(leader._guard.events.recent) == 5, "one for each step, and one for the NaN that is applied"  # type: ignore[union-attr]


def test_a_storm_of_events_is_said_sparingly(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: ten thousand lines that bury the one that matters."""
    log = EventLog(None)
    with caplog.at_level(logging.WARNING, "stabletrain"):
        for step in range(1000):
            log.append(Event(step, "clip", "spike", 2.0, 1.0, "two is above one"))
        log.append(Event(1000, "clip", "skip", 2.0, 1.0, "another kind"))
        log.show()
    assert len(caplog.records) == 11
    assert log.counts == {("clip", "spike"): 1000, ("clip", "skip"): 1}


def test_one_process_speaks_for_all(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: each event said by every rank, in the same words."""
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    with caplog.at_level(logging.WARNING, "stabletrain"):
        fit(Net(), ITEMS, SkipNonFinite())
    assert "step skipped" not in caplog.text


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_metrics_reach_all_loggers_and_the_trainer(mode: str, tmp_path: Path) -> None:
    """Bugs: only the first logger; steps out of order; NaN in a mean; the last interval lost."""
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    recorder = Recorder()
    members = [ClipNorm(max_norm=1e-3), SkipNonFinite(), recorder, Guard(mode=mode)]
    mine = fit(Net("adamw-fused"), ITEMS, *members, logger=loggers, log_every_n_steps=2)
    norms = [o.grad_norm for o in recorder.state if o.applied]
    for each in loggers:
        rows = list(csv.DictReader((Path(each.log_dir) / "metrics.csv").read_text().splitlines()))
        found = [float(row["stability/grad_norm"]) for row in rows if row["stability/grad_norm"]]
        steps = [int(row["step"]) for row in rows]
        assert steps == sorted(steps)
        last = norms[2] if mode == "exact" else mine.callback_metrics["stability/grad_norm"].item()
        assert found[-1] == pytest.approx(last)
        assert max(float(row["stability/skipped"]) for row in rows if row["stability/skipped"]) == 1.0
    names = ("loss", "grad_norm", "grad_norm_max", "clipped_share", "skipped")
    assert mine.callback_metrics.keys() >= {f"stability/{name}" for name in names}
    assert mine.callback_metrics["stability/skipped"] == 1.0


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode", ["exact", "device"])
def test_early_stopping_can_monitor_our_loss(mode: str, first: bool) -> None:
    """Bug: a metric that is not there yet when the epoch ends, if EarlyStopping comes first in the list."""
    stop = EarlyStopping(monitor="stability/loss", patience=1, min_delta=1e9)
    members: list[Callback] = [SkipNonFinite(), Guard(mode=mode)]
    callbacks = [stop, *members] if first else [*members, stop]
    mine = fit(Net("adamw-fused"), ITEMS, *callbacks, max_epochs=9, log_every_n_steps=50)
    assert mine.current_epoch == 2


def test_any_callback_can_listen_to_events() -> None:
    """Bug: events that only the file gets to see."""
    recorder = EventRecorder()
    fit(Net(), ITEMS, SkipNonFinite(), recorder)
    assert [(e.step, e.kind) for e in recorder.events] == [(2, "nonfinite")]


def test_an_interval_without_finite_steps() -> None:
    """Bug: a mean of nothing."""
    recorder = Recorder()
    fit(Net(), batches(NAN_LOSS, NAN_LOSS), SkipNonFinite(), recorder)
    interval, counters = MetricsWindow(), Counters()
    assert interval.take(counters) == {}
    for outcome in recorder.state:
        interval.add(outcome)
        counters = counters.add(outcome)
    assert interval.take(counters) == {"clipped_share": 0.0, "skipped": 2.0}
    assert counters.applied == 0
