"""Does protection harm healthy trainings? Small real trainings with and without it, in one table.

    python benchmarks/harm.py                      run what is not in the record yet, then write the table
    python benchmarks/harm.py --stack default      one protection and the bare runs; may be repeated
    python benchmarks/harm.py --case rare_domain   one case; may be repeated
    python benchmarks/harm.py --shared             without the cases that are held out for acceptance
    python benchmarks/harm.py --table              no training: write the table from the record

The page is about all that the record holds, the lines in the terminal about the selection.
Every run is a line in benchmarks/results/harm.jsonl (the record), so an interrupted benchmark can be continued. A run
is repeated if its case has changed, but not if a plugin has: after a change of the plugins use `--fresh`, which repeats
the selected runs. All cases, protections and three seeds take about a quarter of an hour on one free core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json_lines
from harm_suite import harness, page
from harm_suite.cases import CASES
from harm_suite.judge import Results
from harm_suite.stacks import NOTHING, STACKS, Stack
from harm_suite.training import Case
from json_lines import Record

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
Job = tuple[str, str, int]
"""Case, protection and seed."""


def execute(job: Job) -> Record:
    """Run one job; the names are looked up here because cases cannot be sent to another process."""
    case, stack, seed = job
    by_name = {each.name: each for each in CASES}
    return harness.run(by_name[case], next(each for each in STACKS if each.name == stack), seed)


def train(jobs: Sequence[Job], record: Path, processes: int) -> None:
    """Run all jobs, and append each to the record when it has ended.

    Args:
        jobs: what to run.
        record: the file of JSON lines.
        processes: 1: in this process.
    """
    if processes == 1:
        harness.quiet()
        for index, job in enumerate(jobs):
            _save(execute(job), record, f"{index + 1} of {len(jobs)}")
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=harness.quiet) as pool:
        for index, done in enumerate(as_completed([pool.submit(execute, job) for job in jobs])):
            _save(done.result(), record, f"{index + 1} of {len(jobs)}")


def _save(made: Record, record: Path, progress: str) -> None:
    json_lines.append(record, made)
    ended = f"; {made['ended']}" if made["ended"] else ""
    what = f"{made['case']}, {made['stack']}, seed {made['seed']}: {made['metric']}"
    print(f"{progress}: {what}{ended} ({made['seconds']:.1f} s)", flush=True)


def valid(record: Path) -> list[Record]:
    """Return the records of cases as they are now."""
    known = {each.name: each for each in CASES}
    setups = {name: harness.key(case, NOTHING, 0)["setup"] for name, case in known.items()}
    return [each for each in json_lines.read(record) if setups.get(each["case"]) == each["setup"]]


def selected(cases: Sequence[Case], stacks: Sequence[Stack], seeds: Sequence[int]) -> list[Job]:
    """Return the jobs of a selection, the bare runs first."""
    return [(case.name, stack.name, seed) for stack in stacks for case in cases for seed in seeds]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", action="append", choices=[s.name for s in STACKS], help="default: all")
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="default: all")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--shared", action="store_true", help="only cases on which constants may be chosen")
    part.add_argument("--held-out", action="store_true", help="only cases that are kept for acceptance")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help=f"default: {SEEDS}")
    parser.add_argument("--fresh", action="store_true", help="repeat the selected runs")
    parser.add_argument("--table", action="store_true", help="no training, only write the table")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; default: 1")
    parser.add_argument("--record", type=Path, default=RESULTS / "harm.jsonl", help="the file of JSON lines")
    parser.add_argument("--page", type=Path, help="file of the result page; default: beside the record")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    cases = [
        each
        for each in CASES
        if (not options.case or each.name in options.case)
        and (each.is_held_out or not options.held_out)
        and not (each.is_held_out and options.shared)
    ]
    stacks = [each for each in STACKS if not options.stack or each.name in (NOTHING, *options.stack)]
    jobs = selected(cases, stacks, options.seeds)
    if options.fresh and not options.table:
        again = set(jobs)
        json_lines.write(options.record, [each for each in json_lines.read(options.record) if _job(each) not in again])
    if not options.table:
        done = {_job(each) for each in valid(options.record)}
        train([job for job in jobs if job not in done], options.record, options.jobs)
    results = Results(valid(options.record), options.seeds)
    target: Path = options.page or options.record.with_suffix(".md")
    command = "OMP_NUM_THREADS=1 python benchmarks/harm.py"
    if tuple(options.seeds) != SEEDS:
        command += f" --seeds {' '.join(map(str, options.seeds))}"
    target.write_text(page.page(results, CASES, STACKS, command), encoding="utf-8")
    print(f"{page.summary(results, cases, stacks)}\n\n{target}")


def _job(record: Record) -> Job:
    return record["case"], record["stack"], record["seed"]


if __name__ == "__main__":
    main()
