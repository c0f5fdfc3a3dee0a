"""Which reading of a run moves before its loss does, and how often it moves in healthy runs: one table of both.

    python benchmarks/early_warning.py                 run what is not in the record yet, and print the page
    python benchmarks/early_warning.py --at-most 10    at most ten runs
    python benchmarks/early_warning.py --part unseen   one part; may be repeated
    python benchmarks/early_warning.py --table         no training: print the page from the record
    python benchmarks/early_warning.py --write         also write benchmarks/results/early_warning.md

Small networks on real text and digits, 300 steps each: 14 kinds of trouble with 3 seeds; 8 healthy settings from which
limits are taken (2 seeds) and on which false alarms are counted (3 other seeds); 8 healthy settings with 2 seeds that
play no part in the limits. Every run is a line in benchmarks/results/early_warning.jsonl (the record), with when its
loss rose and a summary of every reading, so an interrupted benchmark can be continued, and limits can be changed
without training. A run is repeated if its setting has changed, but not if a reading has: after that use `--fresh`,
which repeats the selected runs. All 98 runs take about 20 minutes on one free core.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json_lines
import torch
from early_warning_suite import trial
from early_warning_suite.page import page
from early_warning_suite.results import Results
from early_warning_suite.settings import PARTS, SEEDS, Setting
from json_lines import Record

RECORD = Path(__file__).parent / "results" / "early_warning.jsonl"


class Job(NamedTuple):
    """One run."""

    part: str
    setting: Setting
    seed: int

    @property
    def key(self) -> Record:
        """What its record is known by."""
        return trial.key(*self)


def jobs(parts: Sequence[str]) -> list[Job]:
    """All runs of these parts: the calibration, then a seed of every setting after another."""
    found = [
        Job(part, setting, seed) for part in PARTS if part in parts for setting in PARTS[part] for seed in SEEDS[part]
    ]
    return sorted(found, key=lambda job: (job.part != "calibration", job.seed))


def valid(record: Path) -> list[Record]:
    """The records of settings as they are now."""
    keys = [job.key for job in jobs(list(PARTS))]
    return [each for each in json_lines.read(record) if _key(each) in keys]


def train(todo: Sequence[Job], record: Path) -> None:
    """Run all jobs, and append each to the record when it has ended."""
    for index, job in enumerate(todo):
        made = trial.record(*job)
        json_lines.append(record, made)
        print(
            f"{index + 1} of {len(todo)}: {job.part}, {job.setting.name}, seed {job.seed}: loss {made['loss']}, "
            f"risen at {made['risen']} ({made['seconds']:.0f} s)",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--at-most", type=int, metavar="N", help="runs; default: all that are not in the record")
    parser.add_argument("--fresh", action="store_true", help="repeat the selected runs")
    parser.add_argument("--table", action="store_true", help="no training, only the page")
    parser.add_argument("--write", action="store_true", help="also write the page, beside the record")
    parser.add_argument("--record", type=Path, default=RECORD, help="the file of JSON lines")
    options = parser.parse_args(arguments)
    if options.at_most is not None and options.at_most < 0:
        parser.error(f"--at-most: expected at least 0, got {options.at_most}")
    if not options.table:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        selected = jobs(options.part or list(PARTS))
        if options.fresh:
            again = [job.key for job in selected]
            kept = [each for each in json_lines.read(options.record) if _key(each) not in again]
            json_lines.write(options.record, kept)
        done = [_key(each) for each in valid(options.record)]
        train([job for job in selected if job.key not in done][: options.at_most], options.record)
    text = page(Results(valid(options.record)), "OMP_NUM_THREADS=1 python benchmarks/early_warning.py --write")
    print(text)
    if options.write:
        options.record.with_suffix(".md").write_text(text, encoding="utf-8")


def _key(record: Record) -> Record:
    return {name: record[name] for name in ("part", "setting", "seed", "setup")}


if __name__ == "__main__":
    main()
