"""How much does the learning rate matter, with and without the default stack? char_gpt cut short, three seeds.

    python benchmarks/lr_sensitivity.py                        300 steps, 3 seeds, 7 rates: about 25 minutes on one core
    python benchmarks/lr_sensitivity.py --steps 100 --seeds 1  a quick look
    python benchmarks/lr_sensitivity.py --write                also write benchmarks/results/lr_sensitivity.md and .png

The model, data and optimizer are those of the recipe char_gpt, with a warm-up of 7 % and a cosine to a tenth. The final
loss of a run is the mean of its last tenth of attempted steps; one that is not finite, or above that at the start, or
of a run that a plugin stopped, is the loss at the start. The sensitivity is the mean over the rates of
min(loss, loss at the start) - best loss (Wortsman et al. 2023, https://arxiv.org/abs/2309.14322): 0 would be a training
for which every rate is as good as the best. Finished runs are kept in benchmarks/results/lr_sensitivity.jsonl, and not
repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import lightning as L
import torch
from machine import measured
from torch import Tensor

from stabletrain import ScheduleLR, default_callbacks
from stabletrain.runtime.stop import TrainingStopped
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.workloads import CharGPT, ShakespeareData

RESULTS = Path(__file__).parent / "results"
RATES = tuple(10 ** (-3 + place / 2) for place in range(7))
STACKS = ("without", "with the default stack")


class Run(NamedTuple):
    """One training."""

    stack: str
    rate: float
    seed: int
    steps: int
    start: float
    final: float
    end: str
    seconds: float

    @property
    def counted(self) -> float:
        """The final loss, at most that at the start."""
        return min(self.final, self.start) if math.isfinite(self.final) else self.start


class Recorded(CharGPT):
    """The recipe's model, which keeps the loss of every attempted step."""

    def on_train_start(self) -> None:
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def train(stack: str, rate: float, seed: int, steps: int) -> Run:
    """Train once."""
    L.seed_everything(seed, verbose=False)
    module = Recorded(lr=rate, sample_length=0)
    schedule = ScheduleLR("cosine", lr_warmup="7%", min_factor=0.1)
    callbacks = [schedule] if stack == STACKS[0] else default_callbacks(schedule=schedule)
    begin, end = time.perf_counter(), "finished"
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(*callbacks, max_steps=steps, limit_val_batches=0, default_root_dir=folder)
        try:
            trainer.fit(module, datamodule=ShakespeareData(seed=seed))
        except TrainingStopped as stopped:
            end = f"stopped by {stopped.plugin}"
    last = module.losses[-max(1, steps // 10) :]
    final = fmean(last) if end == "finished" else math.inf
    return Run(stack, rate, seed, steps, module.losses[0], final, end, time.perf_counter() - begin)


def runs(rates: Iterable[float], seeds: int, steps: int, file: Path) -> list[Run]:
    """Train what is not in the file yet, a seed at a time, and return all."""
    known = [Run(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    wanted = [(stack, rate, seed, steps) for seed in range(seeds) for rate in rates for stack in STACKS]
    for each in wanted:
        if each not in [run[:4] for run in known]:
            known.append(train(*each))
            with file.open("a") as lines:
                lines.write(json.dumps(known[-1]._asdict()) + "\n")
            print(f"{each[0]:24s} rate {each[1]:.2g} seed {each[2]}: {known[-1].final:.3f} {known[-1].end}", flush=True)
    return [run for run in known if run[:4] in wanted]


def sensitivity(found: Sequence[Run], stack: str, seed: int) -> float:
    """Mean over the rates of the loss above the best of both stacks, so that the two are comparable."""
    best = min(run.counted for run in found if run.seed == seed)
    return fmean(run.counted - best for run in found if (run.stack, run.seed) == (stack, seed))


def page(found: Sequence[Run], command: str) -> str:
    """The result page."""
    seeds = sorted({run.seed for run in found})
    head = "| rate | " + " | ".join(f"{stack}: loss | ends" for stack in STACKS) + " |"
    lines = ["# Sensitivity to the learning rate", "", f"{measured()}. `{command}`", ""]
    lines += [
        f"char_gpt, {found[0].steps} steps, {len(seeds)} seeds; mean ± standard deviation of the final losses.",
        "",
    ]
    lines += ["![final loss over the learning rate](lr_sensitivity.png)", "", head, "|---" * 5 + "|"]
    for rate in sorted({run.rate for run in found}):
        cells = []
        for stack in STACKS:
            here = [run for run in found if (run.stack, run.rate) == (stack, rate)]
            losses = [run.counted for run in here]
            ends = sorted(
                {run.end if run.final < run.start or run.end != "finished" else "above start" for run in here}
            )
            cells.append(f"{fmean(losses):.3f} ± {spread(losses):.3f} | {', '.join(ends)}")
        lines.append(f"| {rate:.2g} | {' | '.join(cells)} |")
    lines += ["", "| | sensitivity | of each seed |", "|---|---|---|"]
    for stack in STACKS:
        values = [sensitivity(found, stack, seed) for seed in seeds]
        each = ", ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {stack} | {fmean(values):.3f} ± {spread(values):.3f} | {each} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def draw(found: Sequence[Run], path: Path) -> None:
    """Draw the final losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="final loss, at most that at the start", xscale="log")
    rates = sorted({run.rate for run in found})
    for number, stack in enumerate(STACKS):
        here = {rate: [r.counted for r in found if (r.stack, r.rate) == (stack, rate)] for rate in rates}
        axes.plot(rates, [fmean(here[rate]) for rate in rates], color=f"C{number}", marker="o", label=stack)
        axes.fill_between(
            rates, [min(here[r]) for r in rates], [max(here[r]) for r in rates], color=f"C{number}", alpha=0.2
        )
    axes.axhline(fmean(run.start for run in found), color="grey", linestyle=":", label="loss at the start")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"char_gpt, {found[0].steps} steps, {len({run.seed for run in found})} seeds (band: least to most)")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print the page, and write it with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    given: Any = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = runs(RATES, given.seeds, given.steps, RESULTS / "lr_sensitivity.jsonl")
    text = page(found, " ".join(["python benchmarks/lr_sensitivity.py", *sys.argv[1:]]))
    print(text)
    if given.write:
        (RESULTS / "lr_sensitivity.md").write_text(text, encoding="utf-8")
        draw(found, RESULTS / "lr_sensitivity.png")


if __name__ == "__main__":
    main()
