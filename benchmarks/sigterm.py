"""What it costs per step that the ranks ask each other for a SIGTERM: after each batch, or every 50 batches.

    python benchmarks/sigterm.py            print the table (about 2 minutes on 2 cores)
    python benchmarks/sigterm.py --write    also write benchmarks/results/sigterm.md

Two gloo processes on the CPU train with DistributedDataParallel. One fit goes through all ways in turn, a block of
batches each, in an order that changes from round to round; the ratio is taken within a round, the median over rounds.
The training of the blocks is the same: the ways differ in the questions alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from machine import measured
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stabletrain as st
from stabletrain.runtime.internals import sigterm

MODELS = {"tiny: 2 layers of 16": (16, 1, 8), "small: 3 layers of 512": (512, 2, 32)}
"""Width, hidden layers, batch size."""
TODAY, NO_BROADCAST, EVERY_50 = "after each batch, as without the setting", "without Lightning's broadcast", "50"
WAYS = (TODAY, NO_BROADCAST, EVERY_50)
SKIPPED = 20
"""Batches at the beginning of each block that are not timed."""


class Net(L.LightningModule):
    """A perceptron on random numbers."""

    def __init__(self, width: int, hidden: int, batch: int) -> None:
        super().__init__()
        layers = [layer for _ in range(hidden) for layer in (nn.Linear(width, width), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        self.x = torch.randn(batch, width)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(self.x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Ways(L.Callback):
    """Switches between the ways at each block's end, on all ranks at the same batch, and takes the time of the blocks.

    Args:
        saver: whose questions are switched.
        rounds: number of rounds of a block of each way.
        batches: in a block.
    """

    def __init__(self, saver: st.SaveCheckpoints, rounds: int, batches: int) -> None:
        generator = random.Random(0)
        self.saver, self.batches = saver, batches
        self.order = [way for _ in range(rounds) for way in generator.sample(WAYS, len(WAYS))]
        self.times: dict[str, list[float]] = {way: [] for way in WAYS}
        self.start = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        block, within = divmod(batch_idx, self.batches)
        if within == 0 and block < len(self.order):
            way = self.order[block]
            sigterm.set_every(trainer, 1 if way == TODAY else 50)
            self.saver.take_over(trainer)
            sigterm.set_every(trainer, 50 if way == EVERY_50 else 1)
        elif within == SKIPPED:
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        block, within = divmod(trainer.fit_loop.epoch_loop.batch_idx, self.batches)
        if within == self.batches - 1 and block < len(self.order):
            self.times[self.order[block]].append((time.perf_counter() - self.start) / (self.batches - 1 - SKIPPED))


def measure(rounds: int, batches: int, folder: str) -> dict[str, dict[str, list[float]]]:
    """What one rank measures: seconds per step of each block, by model and way."""
    found = {}
    for name, (width, hidden, batch) in MODELS.items():
        saver = st.SaveCheckpoints(Path(folder) / str(width), every="1d")
        ways = Ways(saver, rounds, batches)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            callbacks=[ways, saver],
            max_steps=rounds * batches * len(WAYS),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Net(width, hidden, batch), DataLoader(torch.zeros(2 * (trainer.max_steps + 1), 1)))
        found[name] = ways.times
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Median seconds of a step, and the ratios to today's."""
    lines = ["| model | the ranks ask each other | ms per step | ratio | quartiles |", "|---|---|---|---|---|"]
    for model, times in found.items():
        for way in WAYS:
            ratios = [mine / today for mine, today in zip(times[way], times[TODAY], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            label = f"every {way} batches, and Lightning does not" if way == EVERY_50 else way
            ms = statistics.median(times[way]) * 1e3
            lines.append(f"| {model} | {label} | {ms:.2f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def page(text: str, rounds: int, batches: int, words: str) -> str:
    """The page of results."""
    return (
        f"# Asking for SIGTERM\n\n{measured()}. 2 processes, gloo, {rounds} rounds of blocks of {batches} batches; the "
        f"machine was shared.\n\n    {words}\n\n{text}\n\n"
        "Today the ranks ask each other three times after each batch: Lightning broadcasts whether its own handler has "
        "received SIGTERM (which SaveCheckpoints has replaced), SaveCheckpoints asks whether one of them has, and "
        'whether one\'s clock says that a checkpoint is due (`every="10min"`). With `sigterm_every` 50 Lightning does '
        "not ask, and the other two questions are put every 50 batches. What remains is the all-reduce of the "
        "gradients.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/sigterm.md")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of a block of each way, >= 2")
    parser.add_argument("--batches", type=int, default=220, help="in a block, more than 20")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        torch.set_num_threads(1)
        found = measure(arguments.rounds, arguments.batches, os.environ["BENCHMARK_FOLDER"])
        if os.environ["RANK"] == "0":
            Path(os.environ["BENCHMARK_FOLDER"], "found.json").write_text(json.dumps(found))
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may still run, and would abort the process at the interpreter's end
    with tempfile.TemporaryDirectory() as folder, socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = str(any_port.getsockname()[1])
        any_port.close()
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "b", "BENCHMARK_FOLDER": folder}
        ranks = [
            subprocess.Popen([sys.executable, *sys.argv], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        try:
            codes = [each.wait(timeout=1800) for each in ranks]
        finally:
            for each in ranks:
                each.kill()
        if any(codes):
            raise SystemExit(f"a rank has failed: {codes}")
        found = json.loads(Path(folder, "found.json").read_text())
    text = table(found)
    print(text)
    if arguments.write:
        words = f"python benchmarks/sigterm.py --rounds {arguments.rounds} --batches {arguments.batches} --write"
        path = Path(__file__).parent / "results" / "sigterm.md"
        path.write_text(page(text, arguments.rounds, arguments.batches, words), encoding="utf-8")


if __name__ == "__main__":
    main()
