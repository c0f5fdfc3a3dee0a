"""How often the findings of `stabletrain report` are right: alarms in healthy runs, and troubles that are found.

    python benchmarks/findings.py            print the tables (about 2 minutes)
    python benchmarks/findings.py --write    also write benchmarks/results/findings.md

The seeds are ones on which no threshold was set and no rule was tried before. The kinds are not unseen: the rules were
changed until they left the long tail alone, and what is expected of a rate that is too low and of random labels was
written after their first runs. Synthetic ones: 9 healthy kinds of 3 lengths, and
18 kinds of trouble. Real ones: small trainings on scikit-learn's digits under 10 conditions, 4 seeds each.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from finding_suite import digits, synthetic
from machine import measured

from stabletrain.tracking.findings import findings, outcome
from stabletrain.tracking.series import Series

RESULT = Path(__file__).parent / "results" / "findings.md"
SEED = 40_000
"""The first seed of the synthetic runs."""
HEALTHY_SEEDS, TROUBLE_SEEDS, REAL_SEEDS = 10, 7, range(500, 504)
"""Of each length; of each length; all."""
NEVER_CLIPPED_LENGTHS = (1000, 1500, 6000)
"""The bound that never clips is looked for from 1,000 steps on."""


class Row(NamedTuple):
    """The runs of one kind.

    Args:
        kind: of the runs.
        expected: words of the findings that are right; empty: none is.
        right: runs in which one of them was found, or nothing in a healthy one.
        runs: their number.
        others: other findings, with their number.
        outcomes: the outcomes, with their number.
    """

    kind: str
    expected: str
    right: int
    runs: int
    others: Counter[str]
    outcomes: Counter[str]


def judge(kind: str, expected: str, runs: Iterable[Series]) -> Row:
    """Find in all runs of a kind what is in them.

    Args:
        kind: of the runs.
        expected: words of the findings that are right; empty for healthy runs.
        runs: to judge.
    """
    right, count = 0, 0
    others, outcomes = Counter[str](), Counter[str]()
    for run in runs:
        names = [each.name for each in findings(run)]
        right += any(name in expected for name in names) if expected else not names
        others.update(name for name in names if name not in expected)
        outcomes[outcome(run, "finished")] += 1
        count += 1
    return Row(kind, expected, right, count, others, outcomes)


def synthetic_rows() -> tuple[list[Row], list[Row]]:
    """Return the rows of the healthy and of the other synthetic runs."""
    healthy = [
        judge(kind, "", (synthetic.healthy(kind, SEED + seed, steps) for steps in lengths for seed in seeds))
        for kind in synthetic.HEALTHY
        for lengths, seeds in [(synthetic.LENGTHS, range(HEALTHY_SEEDS))]
    ]
    trouble = []
    for name, expected, _ in synthetic.TROUBLES:
        lengths = NEVER_CLIPPED_LENGTHS if expected == "clipped never" else synthetic.LENGTHS
        runs = (synthetic.troubled(name, SEED + seed, steps) for steps in lengths for seed in range(TROUBLE_SEEDS))
        trouble.append(judge(name, expected, runs))
    return healthy, trouble


def real_rows() -> tuple[list[Row], list[Row]]:
    """Train under all conditions; return the rows of the healthy ones and of the others."""
    rows = [
        judge(each.name, each.finding, (digits.train(each, seed) for seed in REAL_SEEDS)) for each in digits.CONDITIONS
    ]
    return [row for row in rows if not row.expected], [row for row in rows if row.expected]


def page(parts: Sequence[tuple[str, Sequence[Row], Sequence[Row]]]) -> str:
    """Return the result page.

    Args:
        parts: title, rows of healthy runs, and rows of the others.
    """
    lines = [
        "# Findings: how often they are right",
        "",
        f"{measured()}; seeds from {SEED} on (synthetic) and {REAL_SEEDS[0]} on (real).",
        "",
        "    OMP_NUM_THREADS=1 python benchmarks/findings.py --write",
        "",
        "Expected in healthy runs is no finding, in the others the one that is named. Others are findings beside it.",
        "No rule was tried on these seeds before. The kinds are not unseen: the rules were changed until they left the",
        "long tail alone, and what is expected of a rate that is too low and of random labels was written after their",
        "first runs on other seeds.",
        "",
        "| | reach | reached |",
        "|---|---|---|",
    ]
    alarms = sum(row.runs - row.right for _, healthy, _ in parts for row in healthy)
    runs = sum(row.runs for _, healthy, _ in parts for row in healthy)
    lines.append(f"| healthy runs with a finding | at most 2 % | {alarms} of {runs} ({alarms / runs:.1%}) |")
    for (title, _, trouble), least in zip(parts, ("95 %", "80 %"), strict=True):
        found, all_of_them = sum(row.right for row in trouble), sum(row.runs for row in trouble)
        share = f"{found} of {all_of_them} ({found / all_of_them:.1%})"
        lines.append(f"| troubles found, {title} runs | at least {least} | {share} |")
    for title, healthy, trouble in parts:
        lines += ["", f"## {title.capitalize()} runs", "", "| run | expected | right | others | outcome |"]
        lines += ["|---|---|---|---|---|", *(_line(row) for row in (*healthy, *trouble))]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    expected = row.expected or "nothing"
    return f"| {row.kind} | {expected} | {row.right} of {row.runs} | {_counts(row.others)} | {_counts(row.outcomes)} |"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.most_common()) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/findings.md")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    text = page([("synthetic", *synthetic_rows()), ("real", *real_rows())])
    print(text)
    if write:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
