"""The page with charts: what it holds, and what untrusted text may do in it."""

import base64
import json
import re
import struct
from typing import get_args

import numpy as np
import pytest

from stabletrain.core.events import Event, EventKind
from stabletrain.errors import UserError
from stabletrain.tracking.page import Cell, Curve, PageRun, PageTable, page, write_page
from stabletrain.tracking.page_charts import KINDS
from stabletrain.tracking.page_data import MAX_EVENTS, page_data

HOSTILE = "</script><script>alert(1)</script>"


def data_of(text: str):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def skip(step: int, reason: str = "loss nan") -> Event:
    return Event(step, "skip_nonfinite", "skip", float("nan"), float("nan"), reason)


def test_untrusted_text_stays_text():
    """Bugs: a run's name, an event's reason, a parameter or a title ends the script block or the page's title, or is
    taken for a place of the template; the policy lets other scripts run, or anything load."""
    run = PageRun(
        name=HOSTILE, group="{{script}}", events=[skip(3, HOSTILE)], curves={"loss": Curve(np.arange(2), np.ones(2))}
    )
    table = PageTable(title=HOSTILE, header=[HOSTILE], rows=[[HOSTILE], [Cell('" onmouseover="x', 1.0)]], note=HOSTILE)
    text = page([run], title=HOSTILE, tables=[table])
    assert "<script>alert" not in text
    assert text.count("<script") == text.count("</script>") == 3
    assert '" onmouseover' not in text
    found = data_of(text)["runs"][0]
    assert (found["name"], found["group"]) == (HOSTILE, "{{script}}")
    assert found["marks"][0]["reasons"] == [HOSTILE]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_values_that_json_or_float32_lacks():
    """Bugs: NaN makes the data no JSON; a value beyond float32 becomes an infinity; a step beyond 16 bits is cut."""
    value = np.array([1.0, np.nan, np.inf, 1e300, -1e300])
    for step in (np.array([0, 1, 2, 3, 70_000]), np.arange(5), np.array([-1, 0, 1, 2, 10**12])):
        packed = page_data([PageRun(name="a", curves={"loss": Curve(step, value)})])["runs"][0]["curves"]["loss"][0]
        form, text = packed[0]
        raw = base64.b64decode(text)
        steps = (
            np.cumsum(struct.unpack("<5H", raw)) if form == "d" else struct.unpack({"u": "<5I", "f": "<5d"}[form], raw)
        )
        assert list(steps) == step.tolist()
        values = np.frombuffer(base64.b64decode(packed[1]), dtype="<f4")
        assert np.array_equal(np.isfinite(values), [True, False, False, True, True])


def test_events_are_complete_or_counted():
    """Bugs: a rollback is thinned away among thousands of clips; counts do not add up; an event that is in the step
    record and in the log is shown twice; reasons of a long run make the page huge."""
    back = Event(5000, "rollback", "rollback", 4.9, 2.4, "loss 4.9")
    clips = np.arange(0, 9000, 2)
    run = PageRun(name="a", events=[skip(3), back], marks={"clip": clips, "skip": np.array([3, 4])})
    marks = {mark["kind"]: mark for mark in page_data([run])["runs"][0]["marks"]}
    assert sum(marks["clip"]["count"]) == len(clips) > MAX_EVENTS
    assert len(marks["clip"]["count"]) <= 500
    assert marks["skip"]["reasons"] == ["loss nan", None]
    assert marks["rollback"]["reasons"] == ["loss 4.9"]
    few = PageRun(name="a", marks={"clip": clips[:MAX_EVENTS]})
    assert "count" not in page_data([few])["runs"][0]["marks"][0]
    noisy = PageRun(name="a", events=[back, *(skip(step, "x" * 10_000) for step in range(MAX_EVENTS - 1))])
    assert len(page([noisy], title="a")) < 500_000


def test_events_that_somebody_has_made_up():
    """Bug: an event of an impossible step, or of no kind, in a run from anywhere, ends the command with a traceback."""
    wrong = [skip(-1), skip(10**30), skip(2)._replace(reason=[1]), skip(3)._replace(kind=["skip"])]
    marks = page_data([PageRun(name="a", events=wrong)])["runs"][0]["marks"]
    assert [(mark["kind"], mark["reasons"]) for mark in marks] == [("skip", ["[1]"])]


def test_every_kind_of_event_is_drawn():
    """Bug: a new kind of event has no mark, and is left out of every page without a word."""
    assert set(get_args(EventKind)) | {"clip"} == {kind.key for kind in KINDS}


def test_colours_say_what_differs():
    """Bug: each run has a colour of its own, although they are four variants of five seeds; the rates of a sweep are
    unordered colours."""
    seeds = page_data([PageRun(name=f"{clip}{seed}", group=clip) for seed in range(5) for clip in "abcd"])["runs"]
    assert len({run["colour"] for run in seeds}) == 4
    rates = page_data(
        [PageRun(name=str(i), group=f"lr={rate}") for i, rate in enumerate((1e-3, 1e-1, 1e-2, 3e-2, 1.0))]
    )
    assert [run["colour"] for run in rates["runs"]] == [("scale", place / 4) for place in (0, 3, 1, 2, 4)]


def test_only_a_page_is_replaced(tmp_path):
    """Bug: `--html train.py` overwrites the user's script; a page cannot be written a second time."""
    file = tmp_path / "new" / "page.html"
    for title in ("one", "two"):
        write_page(file, [], title=title)
    assert "<title>two</title>" in file.read_text()
    other = tmp_path / "train.py"
    other.write_text("print()")
    for wrong, reason in (
        (other, "exists and is no page"),
        (tmp_path, "exists and is no page"),
        (other / "x.html", "cannot write"),
    ):
        with pytest.raises(UserError, match=reason):
            write_page(wrong, [], title="a")
    assert other.read_text() == "print()"
