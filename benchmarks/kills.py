"""Kill trainings with SIGKILL at random times, restart them, and compare their final states bit for bit.

    python benchmarks/kills.py            20 trials with one process, 20 with two, 3 of the command line
    python benchmarks/kills.py --write    also write benchmarks/results/kills.md

Each trial is a training of three epochs in its own processes, with the plugins of a recipe, dropout, shuffled data with
noise, a NaN sample and validations within epochs. Gradient accumulation, loader processes and a monitored metric are on
in some trials and off in others. A checkpoint has 25 MB and is written every few steps, so that many kills happen
during a write; in two of five trials the kill comes shortly after a write has begun. With two ranks, either both or one
of them is killed. Every fourth trial is killed a second time after its restart. A restart is a new process with another
seed and the folder of checkpoints as `ckpt_path`; if no checkpoint was complete, training starts from step 0.

Compared with `torch.equal`, on the bytes of the tensors: weights, optimizer state, random numbers, counters and the
state of every plugin on each rank, and the whole last checkpoint. After each kill every checkpoint under its final name
is read and verified. The exit code is 1 if anything differs or cannot be read, or if no kill happened during a write.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from kill_suite import commands, trial
from kill_suite.moments import evenly_drawn, random_moment
from kill_suite.result import HEADER, Result, problems, row
from kill_suite.training import WRITES, Setup

VARIANTS = ((1, 0, None), (3, 0, "val"), (1, 2, "val"), (3, 2, None))
"""Micro-batches per step, loader processes, and the metric of the best checkpoint."""
VICTIMS = {1: ((0,),), 2: ((0, 1), (0,), (0, 1), (1,))}
"""Number of ranks -> ranks that are killed."""


def trainings(processes: int, number: int, folder: Path, generator: random.Random) -> Iterator[Result]:
    """Run trials of a training with ``processes`` ranks."""
    setups = evenly_drawn([Setup(processes, *each) for each in VARIANTS], number, generator)
    victims = evenly_drawn(VICTIMS[processes], number, generator)
    within = evenly_drawn([True, False, False, True, False], number, generator)
    seconds: dict[Setup, float] = {}
    for index, setup in enumerate(setups):
        whole = folder / f"{processes}-whole-{VARIANTS.index((setup.accumulate, setup.workers, setup.monitor))}"
        if setup not in seconds:
            seconds[setup] = trial.run_whole(setup, whole)
        moments = [random_moment(generator, seconds[setup], WRITES, within[index])]
        if index % 4 == 3:
            moments.append(random_moment(generator, seconds[setup], WRITES // 2, within_write=True))
        result = trial.run_killed(setup, folder / f"{processes}-{index}", moments, victims[index], whole)
        what = f"accumulate {setup.accumulate}, workers {setup.workers}, monitor {setup.monitor}"
        print_trial(f"{processes} process(es), {what}, kills of ranks {victims[index]}", result)
        yield result


def command_lines(processes: int, number: int, folder: Path, generator: random.Random) -> Iterator[Result]:
    """Run trials of `stabletrain train` with ``processes`` ranks."""
    whole = folder / f"command-{processes}-whole"
    if number:
        commands.run_whole(processes, whole)
    for index in range(number):
        killed = commands.KILLED[index % 2]
        result = commands.run_killed(processes, folder / f"command-{processes}-{index}", killed, generator, whole)
        print_trial(f"stabletrain train, {processes} process(es), {killed} killed", result)
        yield result


def print_trial(what: str, result: Result) -> None:
    """Print the result of one trial."""
    end = f"DIFFERENT: {'; '.join(result.different[:5])}" if result.different else "bit-identical"
    print(f"{what}: {', '.join(result.log)}; {end}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=int, default=20, help="trials with one process")
    parser.add_argument("--two", type=int, default=20, help="trials with two processes")
    parser.add_argument(
        "--commands",
        type=int,
        nargs=2,
        default=(2, 1),
        help="trials of the command line with one and with two processes",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the times of the kills")
    parser.add_argument(
        "--folder", type=Path, help="folder for the checkpoints, on a real disk; default: a temporary folder"
    )
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/kills.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder, generator = Path(scratch), random.Random(arguments.seed)
        rows = {
            "1 process": list(trainings(1, arguments.one, folder, generator)),
            "2 processes (DDP, gloo)": list(trainings(2, arguments.two, folder, generator)),
            "`stabletrain train`, 1 process": list(command_lines(1, arguments.commands[0], folder, generator)),
            "`stabletrain train`, 2 processes": list(command_lines(2, arguments.commands[1], folder, generator)),
        }
    everything = [each for results in rows.values() for each in results]
    lines = [HEADER, *(row(name, results) for name, results in rows.items() if results)]
    survivors = sum(each.survivors for each in everything)
    ended = sum(each.ended_themselves for each in everything)
    lines += ["", f"Of {survivors} ranks whose peer was killed, {ended} ended by themselves."] if survivors else []
    lines.append(f"\n{time.monotonic() - began:.0f} s.")
    print("\n".join(lines))
    if arguments.write:
        versions = f"torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}"
        (Path(__file__).parent / "results" / "kills.md").write_text(
            f"# Kills, {date.today().isoformat()}\n\n`python benchmarks/kills.py --write` on {os.cpu_count()} CPU "
            f"cores, one torch thread per process; {versions}.\nThe docstring of the script describes a trial.\n\n"
            + "\n".join(lines) + "\n"
        )  # fmt: skip
    found = problems(everything)
    print(f"\n{'; '.join(found) or 'no differences'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
