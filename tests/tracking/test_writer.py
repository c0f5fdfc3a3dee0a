import json
import logging
import math
import threading
import time
from pathlib import Path

import pytest

from stabletrain.tracking.writer import BATCH, MetricWriter


class Store:
    """Collects batches; can be set to fail."""

    def __init__(self):
        self.points = []
        self.sizes = []
        self.calls = 0
        self.failures = 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, points):
        self.gate.wait(30)
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise OSError("the store is away")
        self.sizes.append(len(points))
        self.points += points


@pytest.fixture
def store():
    return Store()


def writer_for(store, folder: Path, **arguments) -> MetricWriter:
    return MetricWriter(store, folder / "unsent.jsonl", "run1", linger=0.0, delays=(0.001, 0.001), **arguments)


def kept(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "unsent.jsonl").read_text().splitlines()]


def test_everything_arrives_in_order(store, tmp_path):
    """Bug: the tail of the queue is lost at the end, or batches overtake each other."""
    writer = writer_for(store, tmp_path)
    for step in range(50_000):
        writer.put({"loss": float(step)}, step)
    assert writer.close()
    assert [point.step for point in store.points] == list(range(50_000))
    assert max(store.sizes) <= BATCH


def test_flush_waits_for_what_came_before(store, tmp_path):
    """Bug: flush returns while a batch is on its way, so a checkpoint is ahead of its metrics."""
    writer = writer_for(store, tmp_path)
    for step in range(3000):
        writer.put({"a": 1.0}, step)
        if step % 1000 == 999:
            assert writer.flush()
            assert len(store.points) == step + 1
    assert writer.close()
    assert writer.close(), "closing twice must not hang"
    assert writer.flush(), "flushing after the end must not hang"


def test_a_short_failure_is_invisible(store, tmp_path, caplog):
    """Bug: a database that is locked for a moment costs metrics."""
    store.failures = 2
    writer = writer_for(store, tmp_path)
    writer.put({"a": 1.0}, 0)
    assert writer.close()
    assert len(store.points) == 1
    assert not (tmp_path / "unsent.jsonl").exists()
    assert not caplog.records


def test_a_long_failure_keeps_every_metric_and_warns_once(store, tmp_path, caplog):
    """Bug: the thread dies with the first error, and everything after it is lost without a word."""
    store.failures = 3 + 4
    writer = writer_for(store, tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(10):
            writer.put({"a": float(step)}, step)
            assert writer.flush()
    assert writer.close()
    assert [line["step"] for line in kept(tmp_path)] == [0, 1, 2, 3, 4]
    assert [point.step for point in store.points] == [5, 6, 7, 8, 9], "a store that comes back is used again"
    failed, recovered = caplog.records
    assert "unsent.jsonl" in failed.getMessage()
    assert "again" in recovered.getMessage()
    assert kept(tmp_path)[0]["run_id"] == "run1"


def test_a_hanging_store_does_not_hold_the_end_up(store, tmp_path):
    """Bug: finalize waits for ever on a server that does not answer, or drops what is queued."""
    store.gate.clear()
    writer = writer_for(store, tmp_path)
    writer.put({f"m{index}": 0.0 for index in range(3 * BATCH)}, 0)
    assert not writer.flush(timeout=0.2)
    for step in range(1, 5):
        writer.put({"a": float(step)}, step)
    assert not writer.close(timeout=0.05)
    assert [line["step"] for line in kept(tmp_path)] == [0] * 3 * BATCH + [1, 2, 3, 4]
    store.gate.set()


def test_lost_for_good_is_said(store, tmp_path, caplog):
    """Bug: store and disk both fail, and the exception ends the thread silently."""
    store.failures = 100
    (tmp_path / "file").write_text("")
    writer = MetricWriter(store, tmp_path / "file" / "unsent.jsonl", "run1", linger=0.0, delays=())
    writer.put({"a": 1.0}, 0)
    assert writer.close()
    assert "are lost" in caplog.text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_non_finite_values(store, tmp_path, bad, position):
    """Bug: an infinity is stored as 1.8e308 and flattens the plot of everything else."""
    values = [1.0, 2.0, 3.0]
    values[position] = bad
    writer = writer_for(store, tmp_path, nonfinite={"loss": 4})
    for step, value in enumerate(values):
        writer.put({"loss": value, "lr": 0.1}, step)
    assert writer.close()
    loss = [point.value for point in store.points if point.key == "loss"]
    assert [math.isnan(value) for value in loss] == [step == position for step in range(3)]
    (counted,) = [point for point in store.points if point.key == "stability_nonfinite/loss"]
    assert (counted.value, counted.step) == (5.0, position)
    assert [point.value for point in store.points if point.key == "lr"] == [0.1] * 3


def test_colliding_names_stay_apart(store, tmp_path):
    """Bug: two metrics whose names MLflow refuses end as one."""
    writer = writer_for(store, tmp_path)
    writer.put({"x@y": 1.0, "x#y": 2.0, "x_y": 3.0}, 0)
    assert writer.close()
    assert len({point.key for point in store.points}) == 3


def test_a_store_that_fails_now_and_then_is_said_at_a_falling_rate(store, tmp_path, caplog):
    """Bug: two lines on the terminal every second, for days."""
    writer = writer_for(store, tmp_path)
    for step in range(100):
        store.failures = 3
        writer.put({"a": 1.0}, step)
        assert writer.flush()
        writer.put({"a": 1.0}, step)
        assert writer.flush()
    assert writer.close()
    assert len(kept(tmp_path)) == 100
    assert len(caplog.records) == 2 * 7, "of the failures 1, 2, 4 ... 64"


def test_a_store_that_lets_its_callers_wait_is_not_asked_for_every_batch(tmp_path, monkeypatch):
    """Bug: with a locked database each batch waits 20 seconds, and the end of the run waits for all of them."""
    monkeypatch.setattr("stabletrain.tracking.writer._SLOW", 0.05)
    attempts = []

    def slow(points):
        attempts.append(points)
        time.sleep(0.1)
        raise OSError("database is locked")

    writer = writer_for(slow, tmp_path)
    for step in range(10 * BATCH):
        writer.put({"a": 1.0}, step)
    assert writer.close()
    assert len(attempts) <= 2
    assert [line["step"] for line in kept(tmp_path)] == list(range(10 * BATCH))


def test_a_line_that_a_kill_cut_is_not_glued_to_the_next(store, tmp_path):
    """Bug: the first metric after a restart is lost with the line that was cut."""
    (tmp_path / "unsent.jsonl").write_text('{"run_id": "run1", "ke')
    store.failures = 3
    writer = writer_for(store, tmp_path)
    writer.put({"a": 1.0}, 7)
    assert writer.close()
    assert json.loads((tmp_path / "unsent.jsonl").read_text().splitlines()[1])["step"] == 7
