"""`stabletrain reproduce --check`: are repeated runs bit-identical, and is a difference named first?

    python benchmarks/reproduce.py                 print the tables (about 8 minutes on 2 cores)
    python benchmarks/reproduce.py threads data    only these rows
    python benchmarks/reproduce.py --write         also write benchmarks/results/reproduce.md

Every run and every repeat is a process of its own, through the command line, in a temporary folder with its own store.
The repeat reads the original from the store by its id; for the rows of the second table one thing is changed between
the two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from machine import measured

PAGE = Path(__file__).parent / "results" / "reproduce.md"
CHAR_GPT = ("char_gpt", "trainer.max_steps=100", "trainer.val_check_interval=100")
DIGITS = ("digits_cnn", "trainer.max_epochs=null", "trainer.max_steps=100")
PACKAGE = """
from stabletrain.workloads import DigitsCNN


class Mine(DigitsCNN):
    scale = 1.0

    def training_step(self, batch, batch_idx):
        return self.scale * super().training_step(batch, batch_idx)
"""
METADATA = "Metadata-Version: 2.1\nName: my-package\nVersion: {}\n"


class Row(NamedTuple):
    """What a repeat said: its verdict, the first difference that it named, and its exit code."""

    name: str
    verdict: str
    named: str
    code: int


class Runs:
    """Runs ``stabletrain`` in a folder in which the package ``my_package`` can be imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = folder / "packages"
        (self.packages / "my_package").mkdir(parents=True)
        (self.packages / "my_package" / "__init__.py").write_text(PACKAGE)
        self.version("1.0")

    def version(self, version: str) -> None:
        """Let the package have a version."""
        info = self.packages / "my_package.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(METADATA.format(version))
        (info / "top_level.txt").write_text("my_package\n")

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start the command line."""
        path = os.pathsep.join([str(self.packages), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        return subprocess.Popen(
            [sys.executable, "-m", "stabletrain", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, name: str, *words: str, code: int = 0) -> str:
        """Run a recipe, and return the id of its run."""
        process = self.start("train", *words, "--trust", "my_package", f"run_dir={name}")
        errors = process.communicate()[1]
        assert process.returncode == code, errors
        return self.id(name)

    def id(self, name: str) -> str:
        """The id of the run of a folder."""
        found = re.search(r"run_id: (\w+)", (self.folder / name / "run.yaml").read_text())
        assert found
        return found[1]

    def check(self, name: str, run: str, *words: str) -> Row:
        """Repeat a run, and read what was said."""
        process = self.start("reproduce", run, "--check", "--trust", "my_package", *words)
        out, errors = process.communicate()
        said = re.findall(r"^(?:part \d+ of \d+: )?(bit-identical.*|within.*|differs from.*|unknown: .*)$", out, re.M)
        named = re.search(r"(?:cause first|on these steps):\n  (.*)", out)
        if not said:
            print(out, errors, sep="\n")
        return Row(name, "; ".join(said), named[1] if named else "", process.returncode)


def char_gpt(runs: Runs) -> Row:
    return runs.check("char_gpt, 100 steps", runs.train("char", *CHAR_GPT))


def digits(runs: Runs) -> Row:
    return runs.check("digits_cnn, 100 steps", runs.train("digits", *DIGITS))


def first_steps(runs: Runs) -> Row:
    run = runs.train("first_steps", *DIGITS)
    return runs.check("digits_cnn, the first 25 of 100 steps (`--steps 25`)", run, "--steps", "25")


def rollback(runs: Runs) -> Row:
    words = [*DIGITS[:2], "trainer.max_steps=200", "chaos=flip_weight", "chaos.at_step=120"]
    run = runs.train("rollback", *words)
    back = [json.loads(line) for line in (runs.folder / "rollback" / "interventions.jsonl").read_text().splitlines()]
    row = runs.check(f"digits_cnn with chaos=flip_weight, {len(back)} rollback, 200 applied steps", run)
    (again,) = (runs.folder / "runs" / "digits_cnn").glob("*/interventions.jsonl")
    same = again.read_bytes() == (runs.folder / "rollback" / "interventions.jsonl").read_bytes()
    return row._replace(verdict=f"{row.verdict}; interventions.jsonl {'equal' if same else 'DIFFERS'} byte for byte")


def two_processes(runs: Runs) -> Row:
    words = [*DIGITS[:2], "trainer.max_steps=60", "launch=torchrun", "strategy=ddp", "trainer.accelerator=cpu"]
    return runs.check("digits_cnn on 2 processes, 60 steps", runs.train("two", *words))


def resumed(runs: Runs) -> Row:
    words = [*DIGITS[:2], "trainer.max_steps=400", "--trust", "my_package"]
    process = runs.start("train", *words, "run_dir=cut")
    file = runs.folder / "cut" / "steps.bin"
    while process.poll() is None and not (file.exists() and file.stat().st_size > 17 * 50):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    run = runs.id("cut")
    made = file.stat().st_size // 17
    runs.train("cut2", *DIGITS[:2], "trainer.max_steps=400", "resume=cut", f"++logger.run_id={run}")
    return runs.check(f"digits_cnn, SIGTERM after {made} steps, resumed until 400", run)


def threads(runs: Runs) -> Row:
    run = runs.train("one_thread", *DIGITS)
    return runs.check("one thread more (`launch.threads=2`)", run, "launch.threads=2")


def data(runs: Runs) -> Row:
    text = runs.folder / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 4000)
    small = ["model.layers=1", "model.width=32", "model.heads=2", "trainer.max_steps=40", "data.validation_windows=64"]
    run = runs.train("data", "char_gpt", f"data.path={text}", *small)
    text.write_text("To be, or not to be, this is the question. " * 4000)
    return runs.check("another data file under the same name", run)


def code(runs: Runs) -> Row:
    run = runs.train("code", *DIGITS, "model._target_=my_package.Mine")
    file = runs.packages / "my_package" / "__init__.py"
    file.write_text(PACKAGE.replace("scale = 1.0", "scale = 1.0001"))
    try:
        return runs.check("one line of the user's package", run)
    finally:
        file.write_text(PACKAGE)


def package(runs: Runs) -> Row:
    run = runs.train("package", *DIGITS, "model._target_=my_package.Mine")
    runs.version("1.1")
    try:
        return runs.check("the version of one package", run)
    finally:
        runs.version("1.0")


SAME = (char_gpt, digits, first_steps, rollback, two_processes, resumed)
DIFFERENT = (threads, data, code, package)


def tables(same: Sequence[Row], different: Sequence[Row]) -> str:
    lines = ["| run | `reproduce --check` | exit code |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.verdict} | {row.code} |" for row in same]
    lines += ["", "| changed between the two | `reproduce --check` | named first | exit code |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.verdict} | {row.named or 'nothing'} | {row.code} |" for row in different]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=", ".join(each.__name__ for each in (*SAME, *DIFFERENT)))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    def measure(rows: Sequence[Callable[[Runs], Row]]) -> list[Row]:
        found = []
        for row in rows:
            if not arguments.rows or row.__name__ in arguments.rows:
                with tempfile.TemporaryDirectory() as folder:
                    found.append(row(Runs(Path(folder))))
                print(found[-1], file=sys.stderr, flush=True)
        return found

    text = tables(measure(SAME), measure(DIFFERENT))
    print(text)
    if arguments.write:
        PAGE.write_text(
            "# Reproduced runs\n\n"
            f"{measured()}, by `python benchmarks/reproduce.py --write`. Every run and every repeat is a process of "
            "its own; loss, gradient norm and flags of every attempted step are compared as bits.\n\n"
            f"{text}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
