"""Compare protections against faults: the damage by each fault with each protection, in one table.

    python benchmarks/faults.py --jobs 2               run what is not in the record yet, then write the table
    python benchmarks/faults.py --only 'default stack' one contender; may be repeated
    python benchmarks/faults.py --healthy              also the default stack in eleven healthy runs of 2,000 steps
    python benchmarks/faults.py --table                no training: write the table from the record

Every run is a line in benchmarks/results/faults.jsonl (the record), so an interrupted benchmark can be continued;
`--fresh` repeats the selected runs. The table and a plot are written to the same folder. Contenders that are other
projects' packages are left out where they are not installed (`pip install -e '.[peers]'`).
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fault_suite import harness, heat_map, page
from fault_suite.contenders import CONTENDERS, DEFAULT, Contender
from fault_suite.healthy_runs import HEALTHY_RUNS
from fault_suite.judge import Results, key
from fault_suite.other_faults import OTHER_CONDITIONS, OTHER_FAULTS
from fault_suite.scenarios import CONDITIONS, FAULT_FREE, SCENARIOS, Condition

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
ALL = (*SCENARIOS, *OTHER_FAULTS)
SECONDS, SECONDS_FP16 = 0.01, 0.04
"""For the estimate: about the time of a micro-batch, measurements included, in fp32 and in half precision."""


@dataclass(frozen=True)
class Job:
    """One training, and the faults that are applied to copies of it, by the names of its scenarios."""

    contender: str
    condition: Condition
    seed: int
    forks: tuple[str, ...] = ()
    planned: int | None = None
    """Index in HEALTHY_RUNS."""

    @property
    def seconds(self) -> float:
        """Estimated time."""
        rest = self.condition.steps - self.condition.fault
        micro_batches = self.condition.accumulate * (self.condition.steps + len(self.forks) * rest)
        return micro_batches * (SECONDS_FP16 if self.condition.fp16 else SECONDS)

    def __str__(self) -> str:
        return f"{self.contender}, {self.condition.name}, seed {self.seed}"


def missing(chosen: Sequence[Contender], seeds: Sequence[int], only: set[str], record: Path) -> list[Job]:
    """Return the jobs whose runs are not in the record yet."""
    done = {key(each) for each in harness.load(record)}
    jobs = []
    for seed in seeds:
        for contender in chosen:
            for condition in (*CONDITIONS, *OTHER_CONDITIONS):
                here = [s for s in ALL if s.condition is condition and (not only or s.name in only)]
                names = [s.name for s in here if s.make_fault is not None]
                forks = tuple(name for name in names if (contender.name, condition.name, name, seed) not in done)
                twin = (contender.name, condition.name, FAULT_FREE, seed) in done
                if forks or (here and not twin):
                    jobs.append(Job(contender.name, condition, seed, forks))
    return jobs


def missing_healthy(record: Path) -> list[Job]:
    """Return the long runs without a fault that are not in the record yet."""
    done = {key(each) for each in harness.load(record)}
    return [
        Job(DEFAULT, condition, seed, planned=index)
        for index, (condition, seed, _) in enumerate(HEALTHY_RUNS)
        if (DEFAULT, condition.name, FAULT_FREE, seed) not in done
    ]


def be_quiet() -> None:
    """Use one thread, and print no warnings."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def train(job: Job, record: Path) -> float:
    """Run one job, in a folder of its own; return the seconds it took."""
    be_quiet()
    start = time.perf_counter()
    contender = next(each for each in CONTENDERS if each.name == job.contender)
    forks = [s for s in ALL if s.condition == job.condition and s.name in job.forks]
    planned = None if job.planned is None else HEALTHY_RUNS[job.planned][2]
    with tempfile.TemporaryDirectory() as folder:
        save = lambda made: harness.append(record, made)  # noqa: E731
        harness.run(contender, job.condition, job.seed, forks, save, Path(folder), planned)
    return time.perf_counter() - start


def train_all(jobs: Sequence[Job], processes: int, record: Path) -> None:
    """Run jobs in a number of processes."""
    runs, minutes = sum(1 + len(job.forks) for job in jobs), sum(job.seconds for job in jobs) / processes / 60
    print(f"{runs} runs to do, about {minutes:.0f} minutes in {processes} processes", flush=True)
    if processes == 1:
        for job in jobs:
            print(f"{job}: {train(job, record):.0f} s", flush=True)
        return
    with ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(train, job, record): job for job in jobs}
        for future in as_completed(futures):
            print(f"{futures[future]}: {future.result():.0f} s", flush=True)


def forget(record: Path, contenders: set[str], seeds: set[int], scenarios: set[str]) -> None:
    """Delete the selected runs from the record."""
    kept = [
        each
        for each in harness.load(record)
        if not (
            each["contender"] in contenders
            and each["seed"] in seeds
            and (not scenarios or each["scenario"] in scenarios)
        )
    ]
    record.unlink(missing_ok=True)
    for each in kept:
        harness.append(record, each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [each.name for each in CONTENDERS]
    parser.add_argument("--only", action="append", choices=names, help="a contender; default: all")
    parser.add_argument("--scenario", action="append", choices=[s.name for s in ALL], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help=f"default: {SEEDS}")
    parser.add_argument("--healthy", action="store_true", help="also healthy runs of 2,000 steps of the default stack")
    parser.add_argument("--fresh", action="store_true", help="repeat the selected runs")
    parser.add_argument("--table", action="store_true", help="no training, only write the table")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each with one thread; default: 1")
    parser.add_argument("--record", type=Path, default=RESULTS / "faults.jsonl", help="the file of JSON lines")
    parser.add_argument("--page", type=Path, help="file of the result page; default: beside the record")
    arguments = parser.parse_args()
    be_quiet()
    record: Path = arguments.record
    if not arguments.table:
        chosen = installed([each for each in CONTENDERS if not arguments.only or each.name in arguments.only])
        only = set(arguments.scenario or ())
        if arguments.fresh:
            healthy_seeds = {seed for _, seed, _ in HEALTHY_RUNS} if arguments.healthy else set()
            forget(record, {each.name for each in chosen}, {*arguments.seeds, *healthy_seeds}, only)
        jobs = missing(chosen, arguments.seeds, only, record)
        if arguments.healthy and any(each.name == DEFAULT for each in chosen):
            jobs += missing_healthy(record)
        train_all(jobs, arguments.jobs, record)
    results = Results.of(harness.load(record), arguments.seeds)
    runs = {(condition.name, seed) for condition, seed, _ in HEALTHY_RUNS}
    healthy = [each for each in results.records.values() if (each["condition"], each["seed"]) in runs]
    target: Path = arguments.page or record.with_suffix(".md")
    command = "OMP_NUM_THREADS=1 python benchmarks/faults.py --healthy"
    target.write_text(page.page(results, healthy, command), encoding="utf-8")
    heat_map.plot(results, heat_map.present(results)[0], target.with_suffix(".png"))
    print(page.verdict_lines(results, healthy))
    print(f"\n{target}")


def installed(contenders: Sequence[Contender]) -> list[Contender]:
    """Return the contenders that can be run here, and say which cannot."""
    for each in contenders:
        if not each.is_installed:
            print(f"{each.name}: skipped, since {each.package} is not installed (pip install -e '.[peers]')")
    return [each for each in contenders if each.is_installed]


if __name__ == "__main__":
    main()
