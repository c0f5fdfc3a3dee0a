"""One file with the tables and charts of runs, which needs no network: uPlot and all data are in it.

Whatever a run has recorded is untrusted text: it is escaped in the tables and in the data, and the page's
Content-Security-Policy allows the two scripts that it was written with and nothing else, from nowhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stabletrain.errors import UserError
from stabletrain.tracking.page_charts import CHARTS, Chart
from stabletrain.tracking.page_data import PageRun, page_data
from stabletrain.tracking.thinning import Curve
from stabletrain.version import __version__

__all__ = ["CHARTS", "Cell", "Chart", "Curve", "PageRun", "PageTable", "write_page"]

_HERE = Path(__file__).parent
_GENERATOR = "stabletrain"
_LONG = 60
"""Characters of a cell above which its text is broken into lines."""


class Cell(NamedTuple):
    """A cell of a table.

    Args:
        text: what is shown.
        value: by which it is sorted; None: by the text.
        run: index of the run whose colour stands before the text.
    """

    text: str
    value: float | None = None
    run: int | None = None


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """A table of a page; a click on the name of a column sorts it.

    Args:
        title: above it; empty: none.
        header: names of the columns.
        rows: cells, as many in each row as there are columns.
        note: a paragraph below it.
        after: whether it stands below the charts.
    """

    title: str = ""
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    after: bool = False


def write_page(file: str | Path, runs: Sequence[PageRun], *, title: str, tables: Sequence[PageTable] = ()) -> None:
    """Write a page; a page that stabletrain has written there before is replaced.

    Args:
        file: the HTML file.
        runs: their curves and events, one or several.
        title: of the page.
        tables: above the charts, and below them (`PageTable.after`).

    Raises:
        UserError: if the file cannot be written, or is another file than such a page.
    """
    path = Path(file)
    text = page(runs, title=title, tables=tables)
    try:
        if path.exists() and not _is_page(path):
            raise UserError(f"--html: {path} exists and is no page of stabletrain; name another file, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--html: cannot write {str(path)!r} ({reason}); name another file") from None


def page(runs: Sequence[PageRun], *, title: str, tables: Sequence[PageTable] = ()) -> str:
    """Return the HTML of a page; see `write_page`.

    Args:
        runs: their curves and events.
        title: of the page.
        tables: above and below the charts.
    """
    library = _read("uplot/uPlot.iife.min.js")
    script = _read("page_parts/page.js")
    style = _read("uplot/uPlot.min.css") + _read("page_parts/page.css")
    many = len({run.group or run.name for run in runs}) < len(runs)
    content = {
        "policy": (
            f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        "generator": f"{_GENERATOR} {__version__}",
        "title": html.escape(title),
        "style": style,
        "tables": "\n".join(_table(table) for table in tables if not table.after),
        "after": "\n".join(_table(table) for table in tables if table.after),
        "how": "Runs that differ in the seed alone have one colour." if many else "",
        "footer": f"stabletrain {__version__}. Charts: uPlot 1.6.32, MIT licence.",
        "data": _json(page_data(runs)),
        "library": library,
        "script": script,
    }
    return re.sub(r"\{\{([a-z]+)\}\}", lambda match: content[match[1]], _read("page_parts/page.html"))


def _table(table: PageTable) -> str:
    numeric = [
        any(isinstance(row[column], Cell) and row[column].value is not None for row in table.rows)  # type: ignore[union-attr]
        for column in range(len(table.header))
    ]
    head = "".join(
        f'<th scope="col"{_class("number" if number else "")}>{html.escape(name)}</th>'
        for name, number in zip(table.header, numeric, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(cell, number) for cell, number in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    title = f"<h2>{html.escape(table.title)}</h2>\n" if table.title else ""
    note = f'\n<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<section>{title}<div class="scroll"><table class="values"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>{note}</section>"
    )


def _cell(cell: str | Cell, number: bool) -> str:
    text, value, run = cell if isinstance(cell, Cell) else Cell(cell)
    sort = "" if value is None or math.isnan(value) else f' data-value="{value!r}"'
    swatch = "" if run is None else f'<span class="swatch" data-run="{run}"></span>'
    kind = "number" if number else "long" if len(text) > _LONG else ""
    return f"<td{_class(kind)}{sort}>{swatch}{html.escape(text)}</td>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _json(data: object) -> str:
    """JSON that no text in it can end: every ``<`` is written as its code."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _is_page(path: Path) -> bool:
    """Whether a file is one that `write_page` may replace."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'<meta name="generator" content="{_GENERATOR} ' in file.read(4096)
