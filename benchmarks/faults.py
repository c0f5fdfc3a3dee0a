"""Compare protections against faults: the damage by each fault with each protection, in one table.

    python benchmarks/faults.py                        run what is not in the record yet, then write the table
    python benchmarks/faults.py --only 'default stack' one contender; may be repeated
    python benchmarks/faults.py --healthy              also the default stack in four healthy runs of 2,000 steps
    python benchmarks/faults.py --table                no training: write the table from the record

Every run is a line in benchmarks/results/faults.jsonl (the record), so an interrupted benchmark can be continued;
`--fresh` repeats the selected runs. The table and a plot are written to the same folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fault_suite import harness, page
from fault_suite.contenders import CONTENDERS, DEFAULT, Contender
from fault_suite.judge import Results, key
from fault_suite.scenarios import CONDITIONS, FAULT_FREE, HEALTHY_RUNS, SCENARIOS, Condition

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)


def train(contender: Contender, condition: Condition, seed: int, only: set[str], record: Path, folder: Path) -> None:
    """Run what the record lacks for one contender, condition and seed."""
    done = {key(each) for each in harness.load(record)}
    wanted = [
        s for s in SCENARIOS if s.condition is condition and s.make_fault is not None and (not only or s.name in only)
    ]
    forks = [s for s in wanted if (contender.name, condition.name, s.name, seed) not in done]
    if not forks and (contender.name, condition.name, FAULT_FREE, seed) in done:
        return
    start = time.perf_counter()
    harness.run(contender, condition, seed, forks, lambda made: harness.append(record, made), folder)
    print(f"{contender.name}, {condition.name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


def train_healthy(contender: Contender, record: Path, folder: Path) -> None:
    """Run the long runs without a fault that the record lacks."""
    done = {key(each) for each in harness.load(record)}
    for condition, seed, planned in HEALTHY_RUNS:
        if (contender.name, condition.name, FAULT_FREE, seed) not in done:
            start = time.perf_counter()
            harness.run(contender, condition, seed, (), lambda made: harness.append(record, made), folder, planned)
            print(f"{contender.name}, {condition.name}: {time.perf_counter() - start:.0f} s", flush=True)


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
    parser.add_argument("--scenario", action="append", choices=[s.name for s in SCENARIOS], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help=f"default: {SEEDS}")
    parser.add_argument("--healthy", action="store_true", help="also healthy runs of 2,000 steps of the default stack")
    parser.add_argument("--fresh", action="store_true", help="repeat the selected runs")
    parser.add_argument("--table", action="store_true", help="no training, only write the table")
    parser.add_argument("--record", type=Path, default=RESULTS / "faults.jsonl", help="the file of JSON lines")
    parser.add_argument("--page", type=Path, help="file of the result page; default: beside the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    chosen = [each for each in CONTENDERS if not arguments.only or each.name in arguments.only]
    record: Path = arguments.record
    only = set(arguments.scenario or ())
    if arguments.fresh and not arguments.table:
        forget(record, {each.name for each in chosen}, set(arguments.seeds), only)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for seed in () if arguments.table else arguments.seeds:
            for contender in chosen:
                for condition in CONDITIONS:
                    train(contender, condition, seed, only, record, folder)
        if arguments.healthy and not arguments.table:
            for contender in chosen:
                if contender.name == DEFAULT:
                    train_healthy(contender, record, folder)
    results = Results.of(harness.load(record), arguments.seeds)
    runs = {(condition.name, seed) for condition, seed, _ in HEALTHY_RUNS}
    healthy = [each for each in results.records.values() if (each["condition"], each["seed"]) in runs]
    target: Path = arguments.page or record.with_suffix(".md")
    command = "OMP_NUM_THREADS=1 python benchmarks/faults.py --healthy"
    target.write_text(page.page(results, healthy, command), encoding="utf-8")
    page.plot(results, target.with_suffix(".png"))
    print(page.verdict_lines(results))
    print(f"\n{target}")


if __name__ == "__main__":
    main()
