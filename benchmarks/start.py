"""What a command takes until it has done its work: seconds, processor time, and which processes import what.

    python benchmarks/start.py                  seven rounds over all commands; print the table (some 3 minutes)
    python benchmarks/start.py --rounds 3       fewer rounds
    python benchmarks/start.py --write          also write benchmarks/results/start.md

Every command is a new process in a folder of its own; the one after `stabletrain train` trains in the folder of another
run, where the tracking store exists already. The commands take turns, so that a machine that is busy for a while delays
all of them; a first round, which reads files from the disk and compiles modules, is not counted. Processor time is that
of all processes of a command. Imports are counted in one further round: in it, a `sitecustomize` that every process
loads at its start writes a line when torch, Lightning or MLflow begins to be imported.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from machine import measured

RESULT = Path(__file__).parent / "results" / "start.md"
ONE_STEP = ["train", "digits_cnn", "trainer.max_steps=1"]
FIRST, AGAIN = "`stabletrain train`, one step", "the same, the store exists"
COMMANDS: dict[str, list[str]] = {
    "`stabletrain --help`": ["--help"],
    "`stabletrain ls`": ["ls"],
    "`stabletrain show digits_cnn`": ["show", "digits_cnn"],
    "`stabletrain validate digits_cnn`": ["validate", "digits_cnn"],
    FIRST: ONE_STEP,
    AGAIN: ONE_STEP,
    "the same, 2 ranks": [*ONE_STEP, "strategy=ddp", "launch=torchrun", "launch.processes=2"],
}
REQUIRED = {FIRST: "at most 9 s"}
PACKAGES = ("torch", "lightning", "mlflow")
LEFT_OUT = ("MLFLOW_TRACKING_URI", "PYTHONDONTWRITEBYTECODE")
"""Variables of this shell: the store is in the folder of the run, and modules are compiled once, as for a user."""

HOOK = '''
import os
import sys
from importlib.machinery import PathFinder


class Noting:
    """Writes the process and the name of a package when it begins to be imported."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name in PACKAGES else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            with open(os.environ["NOTES_OF_IMPORTS"], "a") as file:
                file.write(f"{os.getpid()} {name}\\n")
            execute(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Noting())
'''


class Taken(NamedTuple):
    """What one call took.

    Args:
        seconds: from its start to its end.
        processor: seconds of processor time, of all its processes.
    """

    seconds: float
    processor: float


def call(arguments: list[str], folder: Path, variables: dict[str, str]) -> Taken:
    """Run a command in a folder."""
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_OUT} | variables
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    command = [sys.executable, "-P", "-m", "stabletrain", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Taken(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def one_round() -> dict[str, Taken]:
    """Run every command once."""
    taken = {}
    with tempfile.TemporaryDirectory(prefix="stabletrain-") as scratch:
        for label, arguments in COMMANDS.items():
            folder = Path(scratch, "train" if arguments is ONE_STEP else arguments[0])
            folder.mkdir(exist_ok=True)
            taken[label] = call(arguments, folder, {})
    return taken


def imports(arguments: list[str]) -> list[int]:
    """The number of a command's processes that import each of the packages."""
    with tempfile.TemporaryDirectory(prefix="stabletrain-") as scratch:
        hook, notes, folder = (Path(scratch, name) for name in ("hook", "notes", "run"))
        hook.mkdir()
        folder.mkdir()
        notes.touch()
        (hook / "sitecustomize.py").write_text(f"PACKAGES = {PACKAGES!r}\n{HOOK}")
        path = os.pathsep.join(filter(None, [str(hook), os.environ.get("PYTHONPATH")]))
        call(arguments, folder, {"PYTHONPATH": path, "NOTES_OF_IMPORTS": str(notes)})
        lines = {tuple(line.split()) for line in notes.read_text().splitlines()}
    return [sum(name == package for _, name in lines) for package in PACKAGES]


def main() -> None:
    """Measure, print the table, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rounds: list[dict[str, Taken]] = []
    for number in range(given.rounds + 1):
        taken = one_round()
        if number:
            rounds.append(taken)
            print(f"round {number}: {taken[FIRST].seconds:.2f} s for one step", file=sys.stderr, flush=True)
    lines = [
        "# From the command to its result",
        "",
        f"{measured()}. Medians of {given.rounds} rounds; the machine was shared.",
        "",
        f"    python benchmarks/start.py --rounds {given.rounds}{' --write' if given.write else ''}",
        "",
        f"One step is `stabletrain {' '.join(ONE_STEP)}`. The last columns: how many of a command's processes import "
        "the package.",
        "",
        f"| command | seconds | least | required | processor time, s | {' | '.join(PACKAGES)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, arguments in COMMANDS.items():
        seconds = [each[label].seconds for each in rounds]
        processor = statistics.median(each[label].processor for each in rounds)
        cells = [label, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f}", REQUIRED.get(label, "")]
        lines.append("| " + " | ".join([*cells, f"{processor:.2f}", *map(str, imports(arguments))]) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.write:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
