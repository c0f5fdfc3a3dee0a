"""What the monitors add to a step: operations, host reads, and time, each against the same training without them.

    python benchmarks/monitors.py            print the tables (about 2 minutes on 1 core)
    python benchmarks/monitors.py --write    also write benchmarks/results/monitors.md

Operations are those that torch dispatches, counted in each batch. Time is of `char_gpt` as shipped, with and without
readings in turns; the machine may be shared, so the median of ratios within a round is reported.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import torch
from counted_operations import counts
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from stabletrain import MonitorActivations, MonitorGradients
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.workloads import CharGPT, DigitsCNN, DigitsData, ShakespeareData

RESULT = Path(__file__).parent / "results" / "monitors.md"


class Model(NamedTuple):
    """A training.

    Args:
        make: the module.
        data: its data.
    """

    make: Callable[[], LightningModule]
    data: Callable[[], LightningDataModule]


MODELS = {
    "char_gpt": Model(lambda: CharGPT(sample_length=0), lambda: ShakespeareData(context=64, batch_size=32)),
    "digits_cnn": Model(DigitsCNN, DigitsData),
}
READINGS: dict[str, Callable[[int], list[Callback]]] = {
    "outputs and logits": lambda every: [MonitorActivations(every, attention="none")],
    "outputs, logits and attention bound (the default)": lambda every: [MonitorActivations(every)],
    "the same with exact attention": lambda every: [MonitorActivations(every, attention="exact")],
    "update ratio": lambda every: [MonitorGradients(every, update_ratio=True)],
    "RMS_t": lambda every: [MonitorGradients(every, rms_t=True)],
    "spectral norm": lambda every: [MonitorGradients(every, spectral_norm=True)],
}


class Clock(Callback):
    """The time of each batch."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.stamps.append(time.perf_counter())

    def seconds(self, skip: int) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.stamps[skip:])]


def fit(model: Model, callbacks: list[Callback], steps: int, log_every: int) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"max_steps": steps, "limit_val_batches": 0, "log_every_n_steps": log_every}
    quiet_trainer(*callbacks, **options).fit(model.make(), datamodule=model.data())


def count(model: Model, plugins: list[Callback]) -> list[tuple[int, int]]:
    """Operations and reads of each of some steps."""
    return counts(lambda callbacks: fit(model, callbacks, 8, 1000), *plugins)


def operations() -> list[str]:
    """The table of operations: step 5 is a look, step 4 is none."""
    lines = [
        "| model | readings | operations of a step | more in a look | share | more in other steps | host reads more |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        bare = count(model, [MonitorGradients(1000)])
        norms = count(model, [MonitorGradients(6)])[5][0] - bare[5][0]
        for readings, make in READINGS.items():
            plugins = make(6)
            of_gradients = isinstance(plugins[0], MonitorGradients)
            ours = count(model, plugins if of_gradients else [MonitorGradients(1000), *plugins])
            more = ours[5][0] - bare[5][0] - (norms if of_gradients else 0)
            reads = ours[5][1] - bare[5][1]
            cells = (name, readings, bare[5][0], more, f"{more / bare[5][0]:.2f}", ours[4][0] - bare[4][0], reads)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def times(rounds: int) -> list[str]:
    """The table of times on char_gpt."""
    model, steps, every = MODELS["char_gpt"], 42, 6
    shares: dict[str, list[float]] = {name: [] for name in READINGS}
    for _ in range(rounds):
        for name, make in READINGS.items():
            clock = Clock()
            fit(model, [*make(every), clock], steps, 1000)
            seconds = clock.seconds(0)
            looks = [s for step, s in enumerate(seconds, 1) if (step + 1) % every == 0][1:]
            others = [s for step, s in enumerate(seconds, 1) if (step + 1) % every][5:]
            shares[name].append(statistics.median(looks) / statistics.median(others) - 1)
    lines = ["| readings | time more in a look | with every=50 |", "|---|---|---|"]
    for name, of in shares.items():
        share = statistics.median(of)
        lines.append(f"| {name} | {share:+.0%} ({min(of):+.0%} to {max(of):+.0%}) | {share / 50:+.2%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("stabletrain").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread"
    text = "\n".join([
        "# What the monitors add to a step",
        "",
        f"`python benchmarks/monitors.py --rounds {arguments.rounds} --write`, {date.today()}, {versions}.",
        "",
        "Operations that torch dispatches in one batch; those of the norms by layer are not counted. Required:",
        "outputs, logits and attention bound on `char_gpt` at most 0.6 of a step in a look, so with `every=50` at",
        "most 1.2 %; 0 in other steps; 0 reads.",
        "",
        *operations(),
        "",
        "Time of a look against the other steps of the same run, `char_gpt` as shipped, 42 steps with a look in",
        "every 6th; median of rounds, and their range. The machine was shared. The norms by layer are included where",
        "the reading is one of monitor_gradients.",
        "",
        *times(arguments.rounds),
        "",
    ])  # fmt: skip
    print(text)
    if arguments.write:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
