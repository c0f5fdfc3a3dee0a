"""Hostile inputs, wrong configs, signals, kills and faults of storage: how many were tried, and how many held.

    python benchmarks/hostile.py                     every kind, about 40 minutes with one process
    python benchmarks/hostile.py --kinds signals     one kind; its results replace the earlier ones of this kind
    python benchmarks/hostile.py --write             also write benchmarks/results/hostile.md
    python benchmarks/hostile.py --count 20          at most so many of each kind, for a quick look

What must hold: a user's mistake is one message and exit code 2, never a traceback; nothing that a config, a checkpoint
or the current folder contains is run, and nothing is written outside the run's folder; a run that is ended has the
exit code and the MLflow status of its true cause, and none stays RUNNING; nothing hangs for 60 s. A config that is
accepted trains two steps. The docstrings in hostile_suite/ say what is done for each kind.

The results of each kind are kept in benchmarks/results/hostile.jsonl. The exit code is 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json_lines
from hostile_suite import cases, checkpoints, config_lines, kills, ranks, recipes, signals, storage
from hostile_suite.trial import Trial
from machine import measured

RESULTS = Path(__file__).parent / "results"
Trials = Callable[[Path, int, int], Iterator[Trial]]


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Args:
        trials: folder, seed and count -> what was tried.
        count: how many by default.
    """

    trials: Trials
    count: int


KINDS = {
    "cases": Kind(cases.trials, 100),
    "config_lines": Kind(config_lines.trials, 1500),
    "recipes": Kind(recipes.trials, 60),
    "damaged": Kind(checkpoints.damaged, 400),
    "resealed": Kind(checkpoints.resealed, 60),
    "signals": Kind(signals.trials, 20),
    "kills": Kind(kills.trials, 30),
    "storage": Kind(storage.trials, 27),
    "ranks": Kind(ranks.trials, 12),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which kinds; default: all")
    parser.add_argument("--count", type=int, help="at most so many trials of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of what is generated")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/hostile.md")
    arguments = parser.parse_args()
    records = {record["kind"]: record for record in json_lines.read(RESULTS / "hostile.jsonl")}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.kinds:
            kind, began = KINDS[name], time.monotonic()
            count = min(kind.count, arguments.count or kind.count)
            found = []
            for trial in kind.trials(Path(scratch) / name, arguments.seed, count):
                found.append(trial)
                if not trial.held:
                    print(f"{trial.kind}: {trial.name}: {trial.problem}", file=sys.stderr, flush=True)
            records[name] = {
                "kind": name,
                "title": found[0].kind,
                "tried": len(found),
                "held": sum(each.held for each in found),
                "failures": [f"{each.name}: {each.problem}" for each in found if not each.held],
                "seconds": round(time.monotonic() - began),
                "seed": arguments.seed,
            }
            if arguments.write:
                json_lines.write(RESULTS / "hostile.jsonl", records.values())
    shown = [records[name] for name in KINDS if name in records] if arguments.write else [
        records[name] for name in arguments.kinds
    ]  # fmt: skip
    print(table(shown))
    if arguments.write:
        (RESULTS / "hostile.md").write_text(page(shown), encoding="utf-8")
    return 1 if any(record["failures"] for record in shown) else 0


def table(records: list[json_lines.Record]) -> str:
    """Return the table in Markdown."""
    lines = ["| what | tried | held | seconds |", "|---|---:|---:|---:|"]
    lines += [f"| {each['title']} | {each['tried']} | {each['held']} | {each['seconds']} |" for each in records]
    return "\n".join(lines)


def page(records: list[json_lines.Record]) -> str:
    """Return the result page in Markdown."""
    failures = [f"- {each['title']}: {failure}" for each in records for failure in each["failures"]]
    parts = [
        "# Hostile inputs, signals, kills and faults of storage",
        f"{measured()}; seed {records[0]['seed']}.\n\n    python benchmarks/hostile.py --write",
        "The script's docstring says what must hold.",
        table(records),
        *(["## What did not hold", "\n".join(failures)] if failures else []),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
