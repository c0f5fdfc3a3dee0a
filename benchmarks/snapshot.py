"""What going back in time costs: a snapshot and a restore against a plain memcpy, and a run with `Rollback`.

    python benchmarks/snapshot.py            print the table (about 4 minutes on 2 cores)
    python benchmarks/snapshot.py --write    also write benchmarks/results/snapshot.md

Every round measures the memcpy (one ``memmove`` of the same bytes between buffers that were written before) right
beside what is compared with it; the median of the ratios within rounds is reported. Large copies are shared by two or
more threads: on a busy machine the ratio says how busy it is, which is why the memcpy is also made tensor by tensor.
What `Rollback` costs a run of ``char_gpt`` is measured in processor time within one run: its own methods against all
the rest. Beside it, whole runs with and without it, two processes that take turns, a step each.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

import stabletrain as st
from stabletrain.runtime.member import GuardMember
from stabletrain.runtime.snapshot import Snapshot
from stabletrain.runtime.taped_loader import TapedLoader
from stabletrain.runtime.train_loader import TrainLoader
from stabletrain.workloads import CharGPT, ShakespeareData


class Large(L.LightningModule):
    """A transformer's parameters, without its forward: only their sizes matter here."""

    def __init__(self, blocks: int = 12, width: int = 512, vocabulary: int = 24_000) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True) for _ in range(blocks)]
        self.body = nn.ModuleList([nn.Embedding(vocabulary, width), *layers])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack([p.sum() for p in self.parameters()]).sum() * 1e-6

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Measure(GuardMember):
    """In the middle of a fit, where snapshots are taken: time a copy, a snapshot and a restore, round by round."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.rows: list[tuple[float, ...]] = []
        self.bytes = self.tensors = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.loader = TrainLoader.of(trainer)
        self.loader.keep_tape()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.global_step != 2:
            return
        assert self._guard is not None
        trainer.optimizers[0].zero_grad()
        snapshot = Snapshot()
        snapshot.prepare(self._guard)
        snapshot.capture(self._guard, self.loader)
        self.bytes, guard = snapshot.nbytes, self._guard
        source, target = (torch.zeros(self.bytes, dtype=torch.uint8) for _ in range(2))
        live = [t.detach() for t in (*pl_module.parameters(), *moments(trainer.optimizers[0]))]
        copies = [torch.zeros_like(each) for each in live]
        for _ in range(self.rounds):
            gc.collect()
            self.rows.append(
                (
                    timed(lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), self.bytes)),
                    timed(lambda: memcpy(copies, live)),
                    timed(lambda: snapshot.capture(guard, self.loader)),
                    timed(lambda: snapshot.restore(guard, self.loader)),
                )
            )
        trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self.loader.close()


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memcpy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """One ``memmove`` for each tensor."""
    for target, source in zip(targets, sources, strict=True):
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor of the optimizer's state."""
    return [each for state in optimizer.state.values() for each in state.values()]


def quiet_trainer(folder: str, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """On the CPU, with nothing but these callbacks."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )


def copies(rounds: int) -> list[str]:
    """Snapshot and restore against the memcpy."""
    measure = Measure(rounds)
    with tempfile.TemporaryDirectory() as folder:
        data = DataLoader([torch.zeros(1)] * 8)  # type: ignore[arg-type]
        quiet_trainer(folder, measure, max_steps=8).fit(Large(), data)
    lines = []
    for i, name in ((2, "snapshot"), (3, "restore")):
        for j, what in ((0, "one memcpy"), (1, "a memcpy of each tensor")):
            ratio = statistics.median(row[i] / row[j] for row in measure.rows)
            mine, plain = (statistics.median(row[k] for row in measure.rows) * 1e3 for k in (i, j))
            reach = "at most 1.1" if j == 0 else ""
            lines.append(
                f"| {name}, {measure.bytes / 1e6:.0f} MB, against {what} | {mine:.1f} ms | {plain:.1f} ms | "
                f"{ratio:.2f} | {reach} |"
            )
    return lines


class TakeTurns(L.Callback):
    """Of two processes that train the same, one at a time makes a step; it times its own."""

    def __init__(self, other: Any, begins: bool) -> None:
        self.other, self.begins = other, begins
        self.steps: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        if not self.begins:
            self.other.recv()
        self.began = time.thread_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.thread_time() - self.began)
        self.other.send(None)
        self.other.recv()
        self.began = time.thread_time()

    def on_train_end(self, *_: Any) -> None:
        self.other.send(None)


class Share:
    """Processor time spent in given methods, as a share of the whole training thread's."""

    def __init__(self) -> None:
        self.spent = 0.0

    def count(self, owner: Any, name: str, sign: float = 1.0) -> Callable[[], None]:
        """Count a method's time from now on, or take it off; returns the function that undoes this."""
        method = getattr(owner, name)

        def timed_method(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.spent += sign * (time.thread_time() - began)

        setattr(owner, name, timed_method)
        return lambda: setattr(owner, name, method)


def share_of_a_run(steps: int) -> str:
    """What `Rollback(every=100)` itself does in a run of char_gpt, all snapshots included."""
    share = Share()
    undo = [share.count(st.Rollback, name) for name in ("on_train_batch_end", "on_outcome", "observe", "limits")]
    undo.append(share.count(TapedLoader, "__next__"))
    undo.append(share.count(_BaseDataLoaderIter, "__next__", -1.0))  # the loader's own work is not ours

    class Clock(L.Callback):
        began = ended = 0.0

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.ended = time.thread_time()
            if trainer.global_step == 1:  # the first step gets the memory, once
                self.began, share.spent = self.ended, 0.0

    clock = Clock()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = quiet_trainer(folder, st.SkipNonFinite(), st.Rollback(every=100), clock, max_steps=steps)
            trainer.fit(CharGPT(), datamodule=ShakespeareData())
    finally:
        for each in undo:
            each()
    per_step = (steps - 1) / 1e3
    mine, rest = share.spent / per_step, (clock.ended - clock.began - share.spent) / per_step
    return (
        f"| {steps} steps of char_gpt: all of Rollback(every=100), against all the rest | {mine:.3f} ms/step | "
        f"{rest:.3f} ms/step | {1 + mine / rest:.4f} | at most 1.005 |"
    )


def one_run(with_rollback: bool, begins: bool, steps: int, other: Any, result: Any) -> None:
    """A process of its own: trains in turns, and sends the times of its steps."""
    settle()
    clock = TakeTurns(other, begins)
    stack = [st.SkipNonFinite(), *([st.Rollback(every=100)] if with_rollback else [])]
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(folder, *stack, clock, max_steps=steps)
        trainer.fit(CharGPT(), datamodule=ShakespeareData())
    result.send(clock.steps)


def pair(kinds: tuple[bool, bool], steps: int) -> float:
    """The median ratio of a step of the second to the same step of the first."""
    # else the C library gives memory back and takes it again, as it happens to lie: several percent, either way
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
    processes = multiprocessing.get_context("spawn")
    turns, results = processes.Pipe(), [processes.Pipe(), processes.Pipe()]
    runs = [
        processes.Process(target=one_run, args=(kind, i == 0, steps, turns[i], results[i][1]))
        for i, kind in enumerate(kinds)
    ]
    for run in runs:
        run.start()
    first, second = (receive.recv() for receive, _ in results)
    for run in runs:
        run.join()
    return statistics.median(b / a for a, b in zip(first[10:], second[10:], strict=True))


def pairs(steps: int) -> list[str]:
    """Runs with and without, in both orders, and what two equal runs show: the noise."""
    with_it = math.sqrt(pair((False, True), steps) / pair((True, False), steps))
    equal = pair((False, False), steps)
    name = f"median step of {steps} of char_gpt, two processes in turns"
    return [
        f"| {name}: with Rollback, against without | | | {with_it:.4f} | |",
        f"| {name}: without, against without (noise) | | | {equal:.4f} | |",
    ]


def settle() -> None:
    """No chatter, one thread."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def main() -> None:
    """Measure, print, and on request write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/snapshot.md")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=410)
    arguments = parser.parse_args()
    settle()
    lines = ["| what | measured | beside it | ratio | reach |", "|---|---|---|---|---|", *copies(arguments.rounds)]
    lines.append(share_of_a_run(arguments.steps))
    lines += pairs(arguments.steps // 2)
    print("\n".join(lines))
    if arguments.write:
        page = Path(__file__).parent / "results" / "snapshot.md"
        page.parent.mkdir(exist_ok=True)
        versions = f"torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}"
        page.write_text(
            f"# Snapshots, {date.today().isoformat()}\n\n`python benchmarks/snapshot.py --write` on {os.cpu_count()} "
            f"CPU cores, one torch thread; {versions}.\nBeside it: a memcpy of the same bytes; the rest of "
            "the run. Ratio: median over rounds, or steps.\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
