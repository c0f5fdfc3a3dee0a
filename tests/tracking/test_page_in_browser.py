"""The page with charts in a real browser, if there is one: drawn, readable, quiet, and without a network."""

import browser
import numpy as np
import pytest

from stabletrain.core.events import Event
from stabletrain.tracking.page import Cell, Curve, PageRun, PageTable, write_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine (apt-get install chromium)"),
]

HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"

COLOURED = """
(() => {
  const colour = getComputedStyle(document.documentElement).getPropertyValue("%s").trim();
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  const canvas = document.querySelector("figure[data-chart=%s] .plot canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4)
    if (data[i + 3] > 200 && [r, g, b].every((c, j) => Math.abs(data[i + j] - c) < 9)) count++;
  return count;
})()
"""
"""Pixels of a chart that have a colour of the stylesheet."""

CONTRAST = """
(() => {
  const light = (colour) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.match(/[0-9.]+/g).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...["h1", ".note", "td", ".unit", ".chip", ".strange"].map((name) => {
    const ink = light(getComputedStyle(document.querySelector(name)).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  }));
})()
"""
"""The smallest contrast between a text and the page."""

PLOT = """
(() => {
  const box = document.querySelector("figure[data-chart=loss] .u-over").getBoundingClientRect();
  return [box.x, box.y, box.width, box.height];
})()
"""
"""The place of the loss chart in the window."""


def run_of(number: int, steps: int = 3000) -> PageRun:
    noise, at = np.random.default_rng(number), np.arange(steps)
    loss = 2 + number / 4 + 2 * np.exp(-at / 300) + noise.normal(0, 0.05, steps)
    loss[1000], loss[1500] = np.nan, 1e6
    events = [
        Event(1000, "skip_nonfinite", "skip", np.nan, np.nan, "the loss is nan"),
        Event(1600, "rollback", "rollback", 9.0, 2.0, "loss 9 above 2 for 20 steps"),
    ]
    return PageRun(
        name=HOSTILE if number == 0 else f"clip=norm seed={number}",
        group=f"variant {number % 2}",
        curves={
            "loss": Curve(at, loss),
            "grad_norm": Curve(at, np.exp(noise.normal(0, 1, steps))),
            "lr": Curve(at, (1 + number) * (1 - at / steps)),
        },
        events=events,
        marks={"clip": at[:: 2 + number]},
    )


@pytest.fixture(scope="module")
def tab():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for count in (1, 6):
        runs = [run_of(number) for number in range(count)]
        rows = [
            [Cell(run.name, run=place), Cell(f"{place}", -place), *["a value"] * 8] for place, run in enumerate(runs)
        ]
        table = PageTable(
            title="Runs", header=["run", "final loss", *(f"column {i}" for i in range(8))], rows=rows, note="a note"
        )
        write_page(folder / f"{count}.html", runs, title=HOSTILE, tables=[table])
    return folder


def test_strange_curves(tab, tmp_path):
    """Bugs: a curve of NaN, of one point, of zeros on a logarithmic axis, of one value, or of steps that are tokens, is
    an error in the console, or keeps the other charts from being drawn; a page without curves shows empty charts."""
    at = np.arange(2500)
    curves = [
        Curve(at, np.full(2500, np.nan)),
        Curve(at[:1], np.ones(1)),
        Curve(at, np.zeros(2500)),
        Curve(at, -np.ones(2500)),
        Curve(at * 10**9, np.full(2500, 1e300)),
        Curve(at[:0], np.empty(0)),
        Curve(at, np.where(at % 2, np.inf, 1.0)),
    ]
    for together in [*([curve] for curve in curves), curves]:
        runs = [
            PageRun(name=str(place), curves=dict.fromkeys(("loss", "grad_norm", "lr"), curve))
            for place, curve in enumerate(together)
        ]
        write_page(tmp_path / "page.html", runs, title="strange")
        tab.open(tmp_path / "page.html", width=800)
        tab.run("document.querySelectorAll('.tool').forEach((tool) => tool.click())")
        assert tab.complaints() == []
        drawn = tab.run("document.documentElement.dataset.drawn")
        assert drawn == ("3" if any(len(curve.step) for curve in together) else None)
    assert tab.run("document.querySelectorAll('figure .plot canvas').length") == 3


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page(tab, pages, count, dark):
    """Bugs: a chart stays empty; a mark of an event is missing; a script of a run's name runs; the policy forbids the
    page's own style or script; something is loaded; text cannot be read in the dark; the page scrolls sideways on a
    telephone; a number sorts as text; a curve cannot be hidden; the values at the cursor are not shown."""
    for width in (1280, 400):
        tab.open(pages / f"{count}.html", width=width, dark=dark)
        assert tab.complaints() == []
        assert tab.requests() == [(pages / f"{count}.html").as_uri()]
        assert tab.run("window.hit") is None
        assert tab.run("document.title") == HOSTILE
        assert tab.run("document.documentElement.dataset.drawn") == "4"
        assert tab.run("document.documentElement.scrollWidth") == width
        for chart in ("loss", "grad_norm", "lr"):
            assert tab.run(COLOURED % ("--c0", chart)) > 50
        for colour in ("--note", "--c0", "--c2"):  # rollback, skip, clip
            assert tab.run(COLOURED % (colour, "events")) > 10
        assert tab.run(CONTRAST) > 4.5
        legend = tab.run("getComputedStyle(document.getElementById('legend')).display")
        assert legend == ("none" if width == 400 else "flex")
    assert tab.run("document.querySelector('.scroll').scrollWidth > document.querySelector('.scroll').clientWidth")

    tab.open(pages / f"{count}.html", width=1280, dark=dark)
    assert tab.run("document.querySelector('.all').textContent") == "values up to 1e+6: show all"
    tab.run("document.querySelectorAll('.values th button')[1].click()")
    column = tab.run("Array.from(document.querySelectorAll('.values tbody tr')).map((row) => row.cells[1].textContent)")
    assert column == [str(place) for place in reversed(range(count))]
    box = tab.run(PLOT)
    tab.move(box[0] + box[2] / 2, box[1] + box[3] / 2)
    assert tab.run("document.querySelector('figure[data-chart=loss] .readout').textContent").startswith("step 1")
    assert tab.run("document.querySelector('figure[data-chart=lr] .readout').textContent").startswith("step 1")
    if count > 1:
        before = tab.run(COLOURED % ("--c1", "loss"))
        tab.run("document.querySelectorAll('#legend .chip')[1].click()")
        assert before > 50 > tab.run(COLOURED % ("--c1", "loss"))
    assert tab.complaints() == []
