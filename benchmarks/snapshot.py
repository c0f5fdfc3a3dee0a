"""Cost of rollbacks: a snapshot and a restore compared with a plain memcpy, and a run with `Rollback`.

    python benchmarks/snapshot.py            print the table (about 4 minutes on 2 cores)
    python benchmarks/snapshot.py --write    also write benchmarks/results/snapshot.md

Every round measures the memcpy (one ``memmove`` of the same number of bytes between buffers that were written before),
the snapshot and the restore; the median of the ratios within rounds is reported. Large snapshots are copied by several
threads, so on a busy machine the ratio depends on the load; therefore a memcpy of each tensor is measured, too. The
cost of `Rollback` in a run of ``char_gpt`` is measured in two ways, in processor time of the training thread: its own
methods compared with the rest of the run; and alternating blocks of steps of one run with and without it. (Alternating
processes cannot be compared: two equal ones differed by up to 5 %, depending on the addresses of their memory.)
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
    """Measures a copy, a snapshot and a restore in each round, within a fit, at the hook where snapshots are taken."""

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
    """Return the duration of a call in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memcpy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each tensor with one ``memmove``."""
    for target, source in zip(targets, sources, strict=True):
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all tensors of the optimizer's state."""
    return [each for state in optimizer.state.values() for each in state.values()]


def quiet_trainer(folder: str, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Return a Trainer for the CPU without output, with these callbacks only."""
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
    """Return the rows that compare snapshot and restore with the memcpy."""
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
    """Sums the processor time that the training thread spends in given methods."""

    def __init__(self) -> None:
        self.spent = 0.0

    def count(self, owner: Any, name: str, sign: float = 1.0) -> Callable[[], None]:
        """Add a method's time from now on (subtract it with ``sign=-1``); return a function that undoes this."""
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
    """Return the row with the time in methods of `Rollback(every=100)` in a run of char_gpt, snapshots included."""
    share = Share()
    undo = [share.count(st.Rollback, name) for name in ("on_train_batch_end", "on_outcome", "observe", "limits")]
    undo.append(share.count(TapedLoader, "__next__"))
    undo.append(share.count(_BaseDataLoaderIter, "__next__", -1.0))  # without the time in torch's loader

    class Clock(L.Callback):
        began = ended = 0.0

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.ended = time.thread_time()
            if trainer.global_step == 1:  # the first step allocates the memory
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
        f"| {steps} steps of char_gpt: all methods of Rollback(every=100), against the rest of the run "
        f"| {mine:.3f} ms/step | "
        f"{rest:.3f} ms/step | {1 + mine / rest:.4f} | at most 1.005 |"
    )


class AlternatingBlocks(L.Callback):
    """Removes a `Rollback` from the running fit and adds it again, in alternating blocks, and measures the steps.

    Args:
        rollback: the plugin; it must not be the first plugin in the list, which leads the guard.
        pairs: number of pairs of blocks.
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
        if trainer.global_step > self.block:  # the first block allocates the memory
            if took:
                self.snapshots.append(spent)
            elif self._count >= 2:
                self.steps[is_in][-1].append(spent)
        self._count += 1
        if self._count >= self.block:
            self._count = 0
            if self._undo is None:
                self._undo = remove_plugin(trainer, self.rollback)
            else:
                self._undo()
                self._undo = None
            self.steps[self._undo is None].append([])
            trainer.should_stop = len(self.steps[True]) > self.pairs
        self._began = time.thread_time()


def remove_plugin(trainer: L.Trainer, rollback: st.Rollback) -> Callable[[], None]:
    """Remove a plugin from a running fit, and bypass its train loader; return a function that undoes this."""
    guard, (loader,) = rollback._guard, rollback._loader.loaders
    lists = [trainer.callbacks, guard.members, guard._rules, guard._outcome_observers]  # type: ignore[attr-defined]
    positions = [each.index(rollback) for each in lists]
    for each in lists:
        each.remove(rollback)
    original = TapedLoader.__next__

    def bypass(self: TapedLoader) -> Any:
        batch = next(self._reader.iterator)  # type: ignore[arg-type]
        self._reader.index_sampler.take()  # type: ignore[union-attr]
        return batch

    TapedLoader.__next__ = bypass  # type: ignore[method-assign]

    def undo() -> None:
        TapedLoader.__next__ = original  # type: ignore[method-assign]
        for each, position in zip(lists, positions, strict=True):
            each.insert(position, rollback)

    assert loader._reader.index_sampler is not None
    return undo


def alternating_blocks(pairs: int, block: int = 20) -> str:
    """Return the row of one run, in alternating blocks with and without `Rollback(every=100)`."""
    rollback = st.Rollback(every=100)
    clock = AlternatingBlocks(rollback, pairs, block)
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
        f"| median step of char_gpt, blocks of {block} with Rollback(every=100), including 1/100 of a snapshot, "
        f"against blocks without, {len(ratios)} pairs | {with_it * 1e3:.2f} ms | {without * 1e3:.2f} ms | {middle:.4f} "
        f"({low:.4f} to {high:.4f}) | at most 1.005 |"
    )


def set_up_process() -> None:
    """Silence log messages and warnings, and use one thread."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/snapshot.md")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=410)
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    set_up_process()
    lines = ["| what | measured | reference | ratio | required |", "|---|---|---|---|---|", *copies(arguments.rounds)]
    lines.append(share_of_a_run(arguments.steps))
    lines.append(alternating_blocks(arguments.pairs))
    print("\n".join(lines))
    if arguments.write:
        page = Path(__file__).parent / "results" / "snapshot.md"
        page.parent.mkdir(exist_ok=True)
        versions = f"torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}"
        page.write_text(
            f"# Snapshots, {date.today().isoformat()}\n\n`python benchmarks/snapshot.py --write` on {os.cpu_count()} "
            f"CPU cores, one torch thread; {versions}.\nReference: a memcpy of as many bytes; the rest of the "
            "run; blocks without the plugin. Ratio: median over rounds or pairs of blocks.\n\n"
            + "\n".join(lines)
            + "\n"
        )


if __name__ == "__main__":
    main()
