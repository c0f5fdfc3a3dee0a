"""What going back in time costs: a snapshot and a restore against a plain memcpy, and a run with `Rollback`.

    python benchmarks/snapshot.py            print the table (about 4 minutes on 2 cores)
    python benchmarks/snapshot.py --write    also write benchmarks/results/snapshot.md

Every round measures the memcpy (one ``memmove`` of the same bytes between buffers that were written before) right
beside what is compared with it; the median of the ratios within rounds is reported. Large copies are shared by two or
more threads: on a busy machine the ratio says how busy it is, which is why the memcpy is also made tensor by tensor.
What `Rollback` costs a run of ``char_gpt`` is measured twice, in processor time of the training thread: its own methods
against all the rest; and blocks of steps of one run, with it and without it by turns. (Two processes that took turns
showed the places of their memory, not the plugin: two equal ones differed by up to 5 %.)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
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
from stabletrain.runtime.data.taped_loader import TapedLoader
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.snapshots.snapshot import Snapshot
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
                    timed(lambda: snapshot.restore(guard, self.loader, "rollback")),
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


class InTurns(L.Callback):
    """Takes a `Rollback` out of the running fit and puts it back, block by block, and times the steps.

    Args:
        rollback: the plugin; another plugin leads the guard.
        pairs: of blocks.
        block: steps in a block; the first two are not counted.
    """

    def __init__(self, rollback: st.Rollback, pairs: int, block: int) -> None:
        self.rollback, self.pairs, self.block = rollback, pairs, block
        self.steps: dict[bool, list[list[float]]] = {True: [], False: []}
        self.snapshots: list[float] = []
        self._undo: Callable[[], None] | None = None
        self._count, self._newest = 0, -1

    def on_train_start(self, *_: Any) -> None:
        self._began = time.thread_time()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        spent, is_in = time.thread_time() - self._began, self._undo is None
        newest = self.rollback._ring.newest
        took = newest is not None and newest.snapshot.applied != self._newest
        self._newest = newest.snapshot.applied if newest is not None else -1
        if trainer.global_step > self.block:  # the first block gets the memory, once
            if took:
                self.snapshots.append(spent)
            elif self._count >= 2:
                self.steps[is_in][-1].append(spent)
        self._count += 1
        if self._count >= self.block:
            self._count = 0
            if self._undo is None:
                self._undo = take_out(trainer, self.rollback)
            else:
                self._undo()
                self._undo = None
            self.steps[self._undo is None].append([])
            trainer.should_stop = len(self.steps[True]) > self.pairs
        self._began = time.thread_time()


def take_out(trainer: L.Trainer, rollback: st.Rollback) -> Callable[[], None]:
    """Leave a plugin, and the loader between the loop and its data, out of a running fit; returns what undoes it."""
    guard, (loader,) = rollback._guard, rollback._loader.loaders
    lists = [trainer.callbacks, guard.members, guard._rules, guard._outcome_observers]  # type: ignore[attr-defined]
    places = [each.index(rollback) for each in lists]
    for each in lists:
        each.remove(rollback)
    through = TapedLoader.__next__

    def straight(self: TapedLoader) -> Any:
        batch = next(self._reader.iterator)  # type: ignore[arg-type]
        self._reader.index_sampler.take()  # type: ignore[union-attr]
        return batch

    TapedLoader.__next__ = straight  # type: ignore[method-assign]

    def undo() -> None:
        TapedLoader.__next__ = through  # type: ignore[method-assign]
        for each, place in zip(lists, places, strict=True):
            each.insert(place, rollback)

    assert loader._reader.index_sampler is not None
    return undo


def in_turns(pairs: int, block: int = 20) -> str:
    """One run, with and without `Rollback(every=100)` by turns."""
    rollback = st.Rollback(every=100)
    clock = InTurns(rollback, pairs, block)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(folder, st.SkipNonFinite(), rollback, clock, max_steps=10**6)
        trainer.fit(CharGPT(), datamodule=ShakespeareData())
    inside, outside = clock.steps[True][1:-1], clock.steps[False][: len(clock.steps[True][1:-1])]
    usual = statistics.median(step for steps in inside for step in steps)
    snapshot = (statistics.median(clock.snapshots) - usual) / 100
    ratios = [(statistics.median(a) + snapshot) / statistics.median(b) for a, b in zip(inside, outside, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    with_it, without = usual + snapshot, statistics.median(step for steps in outside for step in steps)
    return (
        f"| median step of char_gpt, blocks of {block} with Rollback(every=100) and its share of a snapshot, against "
        f"blocks without, {len(ratios)} pairs | {with_it * 1e3:.2f} ms | {without * 1e3:.2f} ms | {middle:.4f} "
        f"({low:.4f} to {high:.4f}) | at most 1.005 |"
    )


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
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    settle()
    lines = ["| what | measured | beside it | ratio | reach |", "|---|---|---|---|---|", *copies(arguments.rounds)]
    lines.append(share_of_a_run(arguments.steps))
    lines.append(in_turns(arguments.pairs))
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
