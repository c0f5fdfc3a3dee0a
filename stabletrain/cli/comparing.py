"""The output of ``stabletrain compare``: tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from stabletrain.launch.comparing import ALL, Compared, compare_recorded, find, write_comparison
from stabletrain.tracking import comparison_url
from stabletrain.tracking.measures import shown

_COLUMNS = 4
"""Runs that stand side by side; more stand below each other."""
_WIDTH = 32
"""Characters of a cell."""
_MOST = 40
"""Parameters that are printed."""


_LOCAL = "http://127.0.0.1:5000"


def run_comparison(
    words: Sequence[str],
    *,
    experiment: str | None,
    query: str,
    seeds: bool,
    equal: bool,
    metrics: Sequence[str],
    html: Path | None,
    limit: int,
) -> None:
    """Find runs, print their comparison, and write the page; the arguments are those of the command line.

    Raises:
        UserError: if there are no such runs, the store cannot be read, or the page cannot be written.
    """
    compared = compare_recorded(find(words, experiment=experiment, query=query, limit=limit))
    print(tables(compared, seeds=seeds, equal=equal, metrics=metrics))
    if len(compared.runs) >= limit and len(words) < limit:
        print(f"\nthese are the newest {limit} runs; for more, add --limit")
    address = mlflow_address(compared)
    if address or html is not None:
        print()
    if address:
        print(f"MLflow:  {address}")
    if html is not None:
        write_comparison(html, compared, seeds=seeds)
        print(f"page:    {html}")


def mlflow_address(compared: Compared) -> str | None:
    """Return the address of MLflow's page that compares the runs of one store; None if there is none.

    Args:
        compared: the runs.
    """
    found = [each.run for each in compared.runs if each.run.run_id is not None and each.run.uri is not None]
    uris = dict.fromkeys(run.uri for run in found)
    if len(found) < 2 or len(uris) != 1:
        return None
    uri = str(found[0].uri)
    server = uri if uri.startswith(("http://", "https://")) else _LOCAL
    experiments = list(dict.fromkeys(run.experiment_id for run in found))
    return comparison_url(server, [str(run.run_id) for run in found], experiments)


def tables(compared: Compared, *, seeds: bool = False, equal: bool = False, metrics: Sequence[str] = ()) -> str:
    """Return the text of a comparison.

    Args:
        compared: the runs.
        seeds: whether runs that differ in the seed alone are one line.
        equal: whether the parameters that are equal in all runs are listed, too.
        metrics: patterns of metrics whose last values are shown, too.
    """
    if seeds:
        parts = [_variants(compared)]
    elif len(compared.runs) <= _COLUMNS:
        parts = [_columns(compared, metrics)]
    else:
        parts = [_rows(compared, metrics)]
    if equal:
        parts.append(_equal(compared))
    parts.append("\n".join(f"  {_plain(note)}" for note in compared.notes))
    return "\n\n".join(part for part in parts if part)


def _columns(compared: Compared, metrics: Sequence[str]) -> str:
    """One column for each run."""
    params = list(compared.params.items())
    rows = [["", *(run.name for run in compared.summaries)]]
    rows += [[name, *("-" if value is None else value for value in row)] for name, row in params[:_MOST]]
    if not params and len(compared.runs) > 1:
        rows.append(["(no parameter differs)"])
    if len(params) > _MOST:
        rows.append([f"(and {len(params) - _MOST} more)"])
    rows += [[""], ["outcome", *(run.outcome for run in compared.summaries)]]
    for each in compared.measures:
        rows.append([each.title, *(shown(each.key, run.measures.get(each.key)) for run in compared.summaries)])
    for name, values in _metrics(compared, metrics):
        rows.append([name, *(shown("", value) for value in values)])
    return aligned(rows)


def _rows(compared: Compared, metrics: Sequence[str]) -> str:
    """One row for each run."""
    params = list(compared.params.items())[:_COLUMNS]
    extra = _metrics(compared, metrics)
    rows = [["run", *(name for name, _ in params), "outcome", *(each.title for each in compared.measures)]]
    rows[0] += [name for name, _ in extra]
    for place, run in enumerate(compared.summaries):
        values = (row[place] for _, row in params)
        row = [run.name, *("-" if value is None else value for value in values), run.outcome]
        row += [shown(each.key, run.measures.get(each.key)) for each in compared.measures]
        rows.append([*row, *(shown("", values[place]) for _, values in extra)])
    hidden = list(compared.params)[_COLUMNS:]
    more = f", {len(hidden) - 10} more" if len(hidden) > 10 else ""
    note = f"\n\nalso different: {_plain(', '.join(hidden[:10]))}{more} (--html shows all)" if hidden else ""
    return aligned(rows) + note


def _variants(compared: Compared) -> str:
    """One row for each variant: mean and standard deviation over its seeds."""
    rows = [["variant", "n", "seeds", "outcomes", *(each.title for each in compared.measures)]]
    for each in compared.variants:
        values = [each.text(measure.key) for measure in compared.measures]
        rows.append([each.label or ALL, str(len(each.members)), ", ".join(each.seeds), each.ends, *values])
    return aligned(rows)


def _equal(compared: Compared) -> str:
    """The parameters that all runs have with one value."""
    first, *others = (run.params for run in compared.summaries)
    same = sorted(name for name, value in first.items() if all(each.get(name) == value for each in others))
    return aligned([["equal in all runs", ""], *([name, first[name]] for name in same)])


def _metrics(compared: Compared, patterns: Sequence[str]) -> list[tuple[str, tuple[float | None, ...]]]:
    rows = compared.comparison.metrics.items()
    return [(name, row) for name, row in rows if any(fnmatchcase(name, pattern) for pattern in patterns)]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows with aligned columns; a text that is too long is cut, a row may be shorter than others.

    >>> print(aligned([["run", "loss"], ["a long name", "2"]]))
    run          loss
    a long name  2
    """
    short = [[_cut(cell) for cell in row] for row in rows]
    widths = [
        max((len(row[column]) for row in short if column < len(row) and len(row) > 1), default=0)
        for column in range(max(map(len, short), default=0))
    ]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in short)
    return "\n".join(lines)


def _cut(text: str) -> str:
    text = _plain(text)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _plain(text: str) -> str:
    """A text of a store, which anybody may have written: in one line, and nothing in it controls the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)
