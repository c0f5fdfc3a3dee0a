"""Compare recorded runs: find them, read what they have, and make the tables and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stabletrain.errors import UserError
from stabletrain.launch.compared_run import EVERY_STEP, ComparedRun, distinct_names, page_run
from stabletrain.launch.recorded_run import RecordedRun, find_run, find_runs
from stabletrain.launch.run_end import PURPOSE
from stabletrain.tracking.comparison import Comparison, RunSummary, side_by_side
from stabletrain.tracking.differences import Row, code_differences
from stabletrain.tracking.measures import MEASURES, Measure, shown
from stabletrain.tracking.page import Cell, PageTable, write_page
from stabletrain.tracking.seeds import Variant, by_seed

SWEEP = "stabletrain.sweep"
"""Tag of the run above the jobs of a sweep, which has trained nothing itself."""
RESUMES = "stabletrain.resumes"
"""Tag of a run that was resumed: how often."""
PARENT = "mlflow.parentRunId"
ALL = "all runs"
"""Name of a variant that is the only one."""
LIMIT = 50
"""Runs that are read from an experiment or a sweep, unless another limit is given."""


def find(
    words: Sequence[str], *, experiment: str | None = None, query: str = "", limit: int = LIMIT
) -> list[RecordedRun]:
    """Return the runs to compare.

    Args:
        words: what `find_run` accepts; a sweep's run stands for its jobs. Or none, and an experiment.
        experiment: its name: all runs, the oldest first.
        query: a filter for the runs of the experiment, in MLflow's language.
        limit: the maximum number of runs of the experiment or of a sweep, the newest.

    Raises:
        UserError: if there are no such runs, or the store cannot be read.
    """
    if bool(words) == (experiment is not None):
        raise UserError(
            "compare: expected runs (id, beginning of an id, name or folder), or --experiment NAME, got "
            f"{'both' if words else 'neither'}"
        )
    if experiment is None and query:
        raise UserError("compare: --filter chooses from the runs of an experiment; add --experiment NAME")
    if limit < 1:
        raise UserError(f"compare: --limit must be >= 1, got {limit}")
    if experiment is not None:
        found = find_runs(command="compare", experiment=experiment, query=query, limit=limit)
        found = [each for each in found if PURPOSE not in each.tags]
    else:
        found = [each for word in words for each in _jobs(find_run(word, command="compare"), limit)]
    distinct: dict[str, RecordedRun] = {}
    for run in reversed(found) if experiment is not None else found:
        if SWEEP not in run.tags:
            distinct.setdefault(run.run_id or str(run.folder), run)
    if not distinct:
        of = f"the experiment {experiment!r}" if experiment is not None else "the sweep"
        raise UserError(f"compare: {of} has no runs{f' that fit {query!r}' if query else ''}; name others")
    return list(distinct.values())


def _jobs(run: RecordedRun, limit: int) -> list[RecordedRun]:
    if SWEEP not in run.tags or run.run_id is None:
        return [run]
    query = f"tags.`{PARENT}` = '{run.run_id}'"
    return find_runs(command="compare", experiment=run.experiment, query=query, limit=limit, uri=run.uri)[::-1]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Runs side by side.

    Args:
        runs: at least one.
    """

    runs: Sequence[ComparedRun]

    @cached_property
    def comparison(self) -> Comparison:
        """The runs with the parameters in which they differ, and their metrics."""
        return side_by_side([each.summary for each in self.runs])

    @cached_property
    def summaries(self) -> Sequence[RunSummary]:
        """The runs as columns."""
        return self.comparison.runs

    @cached_property
    def params(self) -> Mapping[str, Row]:
        """The parameters in which the runs differ, and then the versions of code and data."""
        return {**self.comparison.params, **code_differences([each.tags for each in self.summaries])}

    @cached_property
    def measures(self) -> Sequence[Measure]:
        """The measures that at least one run has, without counts of what never happened."""
        return [each for each in MEASURES if any(_says_something(each.key, run.measures) for run in self.summaries)]

    @cached_property
    def variants(self) -> Sequence[Variant]:
        """The groups of runs that differ in the seed alone."""
        return by_seed(self.summaries, self.comparison.params)

    @cached_property
    def notes(self) -> Sequence[str]:
        """What the measures are, and where the losses come from if not all from the record of every step."""
        notes = [f"{each.title}: {each.note}" for each in self.measures if each.note]
        sources: dict[str, list[str]] = {}
        for each in self.runs:
            sources.setdefault(each.loss_from, []).append(each.run.name)
        if resumed := [each.run.name for each in self.runs if RESUMES in each.run.tags]:
            notes.append(f"wall time of {_names(resumed)}: from the first start to the last end")
        if list(sources) == [EVERY_STEP]:
            return notes
        sampled = [name for source, names in sources.items() if source != EVERY_STEP for name in names]
        if any(each.key == "spikes" for each in self.measures):
            notes.append(f"spikes of {_names(sampled)}: those that a detector reported, if there was one")
        for source, names in sources.items():
            notes.append(f"loss of {_names(names)}: {source or 'none was recorded'}")
        return notes


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_ALWAYS = ("final_loss", "best_loss", "skipped", "clipped_share", "rollbacks", "spikes", "steps", "wall_s")


def _says_something(key: str, measures: Mapping[str, float]) -> bool:
    return key in measures and (key in _ALWAYS or measures[key] != 0)


def compare_recorded(runs: Sequence[RecordedRun]) -> Compared:
    """Return runs side by side; nothing is read until it is asked for.

    Args:
        runs: at least one.
    """
    return Compared(runs=distinct_names([ComparedRun(run=run) for run in runs]))


def write_comparison(file: str | Path, compared: Compared, *, title: str | None = None, seeds: bool = False) -> None:
    """Write the page of a comparison.

    Args:
        file: the HTML file.
        compared: the runs.
        title: of the page; None: it follows from the runs.
        seeds: whether a table of the variants, with the mean over their seeds, comes first.

    Raises:
        UserError: if it cannot be written, or the store cannot be read.
    """
    variants = compared.variants
    group_of = {place: variant.label or ALL for variant in variants for place in variant.members}
    by_variant = seeds or len(compared.runs) > 5
    pages = [page_run(each, group_of[place] if by_variant else "") for place, each in enumerate(compared.runs)]
    tables = [_variants_table(compared)] if seeds else []
    tables.append(_runs_table(compared, "Runs" if seeds else ""))
    write_page(file, pages, title=title or _title(compared), tables=tables)


def _title(compared: Compared) -> str:
    experiments = dict.fromkeys(each.run.experiment for each in compared.runs if each.run.experiment)
    count = len(compared.runs)
    runs = compared.runs[0].run.name if count == 1 else f"{count} runs compared"
    return f"{', '.join(experiments)}: {runs}" if experiments else runs


def _runs_table(compared: Compared, title: str) -> PageTable:
    rows: list[list[str | Cell]] = [
        [
            Cell(run.name, run=place),
            *(_text_cell(row[place]) for row in compared.params.values()),
            run.outcome,
            *(
                Cell(shown(each.key, run.measures.get(each.key)), run.measures.get(each.key))
                for each in compared.measures
            ),
        ]
        for place, run in enumerate(compared.summaries)
    ]
    header = ["run", *compared.params, "outcome", *(each.title for each in compared.measures)]
    return PageTable(title=title, header=header, rows=rows, note="; ".join(compared.notes))


def _variants_table(compared: Compared) -> PageTable:
    rows: list[list[str | Cell]] = [
        [
            Cell(each.label or ALL, run=each.members[0]),
            Cell(str(len(each.members)), float(len(each.members))),
            ", ".join(each.seeds),
            each.ends,
            *(
                Cell(each.text(measure.key), each.spreads[measure.key].mean if measure.key in each.spreads else None)
                for measure in compared.measures
            ),
        ]
        for each in compared.variants
    ]
    header = ["variant", "n", "seeds", "outcomes", *(each.title for each in compared.measures)]
    return PageTable(title="Mean and standard deviation over seeds", header=header, rows=rows)


def _text_cell(value: str | None) -> Cell:
    try:
        return Cell(value or "-", float(value or ""))
    except ValueError:
        return Cell("-" if value is None else value)
