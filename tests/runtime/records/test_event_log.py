"""The event log: how large its file can become."""

import json
import logging
import math
from pathlib import Path

import pytest

from stabletrain.core.events import Event
from stabletrain.runtime.records import event_log
from stabletrain.runtime.records.event_log import EventLog


def test_a_run_with_an_event_at_every_step_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: 200,000 skipped steps are a file of a gigabyte; or a bound that loses a rollback among them."""
    monkeypatch.setattr(event_log, "_FULL", 20_000)
    log = EventLog(tmp_path / "events.jsonl")
    with caplog.at_level(logging.WARNING, "stabletrain"):
        for step in range(5000):
            log.append(Event(step, "skip_outliers", "skip", 9.0, 3.0, "loss 9 > 3: step skipped"))
            if step % 1000 == 0:
                log.append(Event(step, "rollback", "rollback", 50.0, math.nan, "back to the snapshot"))
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (tmp_path / "events.jsonl").stat().st_size < 22_000
    assert [each["step"] for each in lines if each["kind"] == "rollback"] == [0, 1000, 2000, 3000, 4000]
    assert log.counts["skip_outliers", "skip"] == 5000
    assert max(each["step"] for each in lines if each["kind"] == "skip") == 4095  # the 4096th
    assert sum("from now on" in record.message for record in caplog.records) == 1
