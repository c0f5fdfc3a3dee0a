"""``stabletrain report --html``: numbers and findings of one run, its charts, and its interventions, in one file."""

from __future__ import annotations

from pathlib import Path

from stabletrain.cli.report import RunReport
from stabletrain.launch.compared_run import ComparedRun, page_run
from stabletrain.tracking.page import Cell, PageTable, write_page

_MOST = 2000
"""Interventions in the table."""


def write_report(file: Path, report: RunReport) -> None:
    """Write the page of a report; unlike the text it has all findings.

    Args:
        file: the HTML file.
        report: from `stabletrain.cli.report.read_report`.

    Raises:
        UserError: if the page cannot be written, or the store cannot be read.
    """
    tables = [PageTable(title="Numbers", header=["", "recorded"], rows=[list(row) for row in report.numbers])]
    if report.findings:
        rows = [[each.name, each.text, each.advice, each.source] for each in report.findings]
        note = "Findings are hints and no diagnosis: thresholds on what was recorded, the worst first."
        tables.append(PageTable(title="Findings", header=["finding", "numbers", "try", "source"], rows=rows, note=note))
    else:
        tables[0] = PageTable(title="Numbers", header=["", "recorded"], rows=tables[0].rows, note=report.summary)
    if report.done:
        more = f"The first {_MOST} of {len(report.done)}; events.jsonl has all." if len(report.done) > _MOST else ""
        done = [
            [Cell(str(event.step), float(event.step)), event.kind, event.plugin, event.reason]
            for event in report.done[:_MOST]
        ]
        header = ["step", "what", "plugin", "reason"]
        tables.append(PageTable(title="Interventions", header=header, rows=done, note=more, after=True))
    write_page(file, [page_run(ComparedRun(run=report.run))], title=report.title, tables=tables)
