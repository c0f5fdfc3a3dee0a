"""Kills trainings at random moments with SIGKILL, starts them again, and compares their ends bit for bit.

    python benchmarks/kills.py            20 moments with one process, 20 with two, 3 through the command line
    python benchmarks/kills.py --write    also write benchmarks/results/kills.md

Each trial is a real training in processes of its own with the stack of a recipe: dropout, shuffled data with noise, a
sample that is NaN, validations within epochs, three epochs; by turns with accumulation, with loader processes, and with
the best checkpoint kept. A checkpoint has 25 MB and one is written every few steps, so that many kills hit a write; for
two moments of five the trial waits until a write has begun. Of two ranks, by turns both or only one is killed. Every
fourth trial is killed again after it was started again. Started again means: a new process with another seed, and
`ckpt_path` is the folder of checkpoints; or from the beginning, if no checkpoint was complete.

Compared are, with `torch.equal` on their bytes: weights, optimizer state, random numbers, counters and the state of
every plugin on each rank, and all of the last checkpoint. After each kill every checkpoint that has its name is read
and verified. The exit code is 1 if anything differs or cannot be read, or if no kill hit a write.
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
from kill_suite.moments import dealt, random_moment
from kill_suite.result import HEADER, Result, problems, row
from kill_suite.training import WRITES, Setup

VARIANTS = ((1, 0, None), (3, 0, "val"), (1, 2, "val"), (3, 2, None))
"""Micro-batches of a step, loader processes, the metric of the best checkpoint."""
VICTIMS = {1: ((0,),), 2: ((0, 1), (0,), (0, 1), (1,))}
"""By the number of ranks: the ranks that are killed."""


def trainings(processes: int, number: int, folder: Path, generator: random.Random) -> Iterator[Result]:
    """Trials of a training with so many processes."""
    setups = dealt([Setup(processes, *each) for each in VARIANTS], number, generator)
    victims = dealt(VICTIMS[processes], number, generator)
    within = dealt([True, False, False, True, False], number, generator)
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
        say(f"{processes} process(es), {what}, kills of ranks {victims[index]}", result)
        yield result


def command_lines(processes: int, number: int, folder: Path, generator: random.Random) -> Iterator[Result]:
    """Trials of `stabletrain train` with so many processes."""
    whole = folder / f"command-{processes}-whole"
    if number:
        commands.run_whole(processes, whole)
    for index in range(number):
        killed = commands.KILLED[index % 2]
        result = commands.run_killed(processes, folder / f"command-{processes}-{index}", killed, generator, whole)
        say(f"stabletrain train, {processes} process(es), {killed} killed", result)
        yield result


def say(what: str, result: Result) -> None:
    """One trial, while the others go on."""
    end = f"DIFFERENT: {'; '.join(result.different[:5])}" if result.different else "bit-identical"
    print(f"{what}: {', '.join(result.log)}; {end}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=int, default=20, help="trials with one process")
    parser.add_argument("--two", type=int, default=20, help="trials with two")
    parser.add_argument("--commands", type=int, nargs=2, default=(2, 1), help="command lines with one, and with two")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints go, on a real disk; default: a temporary one"
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
    lines += ["", f"Of {survivors} ranks that lost the other one, {ended} ended by themselves."] if survivors else []
    lines.append(f"\n{time.monotonic() - began:.0f} s.")
    print("\n".join(lines))
    if arguments.write:
        versions = f"torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}"
        (Path(__file__).parent / "results" / "kills.md").write_text(
            f"# Kills, {date.today().isoformat()}\n\n`python benchmarks/kills.py --write` on {os.cpu_count()} CPU "
            f"cores, one torch thread a process; {versions}.\nWhat a trial is, the script says at its beginning.\n\n"
            + "\n".join(lines) + "\n"
        )  # fmt: skip
    found = problems(everything)
    print(f"\n{'; '.join(found) or 'as it should be'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
