"""What the checks have answered: a table, worst first, and JSON."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stabletrain.checkup.answer import KINDS, Answer
from stabletrain.checkup.table import Check

_HINT = (
    "A finding is a hint and no diagnosis; docs/doctor.md has thresholds and sources. Wrong labels of single samples "
    "are not looked for: cleanlab does that, with the predictions of a trained model."
)


@dataclass(frozen=True)
class Result:
    """One check and its answer.

    Args:
        check: of the table.
        answer: for this module.
    """

    check: Check
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Report:
    """All answers about one module. ``print(report)`` shows them as a table.

    Args:
        name: of the module or the recipe.
        results: of all checks, the worst first.
        seconds: that they took.
    """

    name: str
    results: tuple[Result, ...]
    seconds: float

    @property
    def findings(self) -> list[Result]:
        """The answers that are findings, the worst first."""
        return [each for each in self.results if each.answer.kind == "finding"]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, width: int | None = None) -> Iterator[str]:
        """The table, then the tracebacks of exceptions.

        Args:
            width: of a line, in characters; None: that of the terminal.
        """
        width = max(60, width or shutil.get_terminal_size((120, 24)).columns)
        counts = Counter(each.answer.kind for each in self.results)
        found = counts["finding"]
        yield (
            f"{self.name}: {found or 'no'} finding{'s' * (found != 1)}, {counts['fine']} fine, "
            f"{counts['not applicable']} not applicable ({self.seconds:.0f} s)"
        )
        yield ""
        names = max((len(each.check.name) for each in self.results), default=0)
        kinds = max(map(len, KINDS))
        for each in self.results:
            head = f"{each.answer.kind:<{kinds}}  {each.check.name:<{names}}  "
            text = " ".join(each.answer.text.split())
            yield from _wrapped(head, text, width)
            if each.answer.kind == "finding":
                yield from _wrapped(" " * len(head), f"try: {each.check.advice}", width)
        yield ""
        yield from textwrap.wrap(_HINT, width)
        for each in self.results:
            if each.answer.details:
                yield from ("", f"{each.check.name}:", each.answer.details)

    def as_json(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, texts and numbers."""
        return {
            "name": self.name,
            "seconds": round(self.seconds, 3),
            "findings": len(self.findings),
            "results": [
                {
                    "check": each.check.name,
                    "family": each.check.family,
                    "answer": each.answer.kind,
                    "text": each.answer.text,
                    "details": each.answer.details,
                    "measured": each.check.measured,
                    "threshold": each.check.threshold,
                    "advice": each.check.advice,
                    "source": each.check.source,
                }
                for each in self.results
            ],
        }


def _wrapped(head: str, text: str, width: int) -> Iterator[str]:
    lines = textwrap.wrap(text, max(30, width - len(head)), break_on_hyphens=False) or [""]
    yield (head + lines[0]).rstrip()
    yield from (" " * len(head) + line for line in lines[1:])
