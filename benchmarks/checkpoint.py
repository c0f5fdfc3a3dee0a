"""Cost of a durable checkpoint of 600 MB in training: the stall for the copy, and the slow-down during the write.

    python benchmarks/checkpoint.py            print the table (about 3 minutes on 2 quiet cores)
    python benchmarks/checkpoint.py --write    also write benchmarks/results/checkpoint.md
    python benchmarks/checkpoint.py --killed [--write]    instead, kill runs at every file event of their saves (2 min)

A transformer of 50 M parameters is trained with AdamW in Lightning. Windows of steps with and without a save at their
beginning alternate; a window is as long as a save takes to reach the disk. *Exposed* is the difference of the durations
of two paired windows: the stall and the slow-down of the concurrent steps together. The memcpy is measured in the same
process, between windows. The machine may be shared, so medians over pairs are reported, with quartiles, and in addition
to the wall-clock time the processor time of the training thread, which depends less on other processes.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from stabletrain import SaveCheckpoints
from stabletrain.runtime.checkpoints.encoding import Encoded
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers, bytes_of

Save = Callable[[L.Trainer], None]
PAGE = Path(__file__).parent / "results" / "checkpoint.md"
KILLED = "\n## Killed at every file event\n\n"


class Batches(IterableDataset[Tensor]):
    def __init__(self, tokens: int) -> None:
        self.batch = torch.randint(0, 24_000, (2, tokens))

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.batch


class Transformer(L.LightningModule):
    """A transformer of 50 M parameters with 12 layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24_000, 512)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, norm_first=True, dropout=0.0)
            for _ in range(layers)
        )

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = self.embedding(batch)
        for block in self.blocks:
            x = block(x)
        return x.pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=True)


class Bench(L.Callback):
    """Starts and ends the windows at the ends of steps, and measures between two windows."""

    def __init__(self, pairs: int, saves: dict[str, tuple[Save, Save]]) -> None:
        self.pairs, self.saves = pairs, saves
        self.stall: dict[str, list[float]] = {name: [] for name in saves}
        self.exposed: dict[str, list[float]] = {name: [] for name in saves}
        self.busy: dict[str, list[float]] = {name: [] for name in saves}
        self.durable: dict[str, list[float]] = {name: [] for name in saves}
        self.memcpy: list[float] = []
        self.copy: list[float] = []
        self.nbytes = 0
        self.step_ms = 0.0
        self._plan: Iterator[None] | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._plan is None:
            if trainer.global_step < 3:
                return
            self._plan = self.windows(trainer)
        next(self._plan, None)

    def windows(self, trainer: L.Trainer) -> Iterator[None]:
        tensors = Encoded(trainer_internals.dump_checkpoint(trainer)).tensors
        self.nbytes = bytes_of(tensors)
        source = torch.empty(self.nbytes, dtype=torch.uint8).random_()
        target = torch.zeros(self.nbytes, dtype=torch.uint8)
        buffers = SnapshotBuffers()
        buffers.prepare(tensors)
        steps = dict.fromkeys(self.saves, 0)
        for name, (
            save,
            wait,
        ) in self.saves.items():  # the first save allocates; the second determines the length of a window
            save(trainer)
            wait(trainer)
            save(trainer)
            waiting = Thread(target=wait, args=(trainer,))
            waiting.start()
            while waiting.is_alive():
                steps[name] += 1
                yield
            steps[name] += 1 + steps[name] // 2
        single = []
        for pair in range(self.pairs):
            self.memcpy.append(timed(lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), self.nbytes)))
            self.copy.append(timed(lambda: buffers.copy_in(tensors)))
            for name, (save, wait) in self.saves.items():
                spent, busy = {}, {}
                for with_save in (True, False) if pair % 2 else (False, True):
                    began, busy[with_save] = time.perf_counter(), -time.thread_time()
                    if with_save:
                        save(trainer)
                        self.stall[name].append((time.perf_counter() - began) * 1e3)
                    for _ in range(steps[name]):
                        yield
                    spent[with_save] = (time.perf_counter() - began) * 1e3
                    busy[with_save] += time.thread_time()
                    rest = timed(lambda wait=wait: wait(trainer))
                    if with_save and rest > 5.0:  # the window was too short: the write continues after it
                        self.durable[name].append(rest)
                self.exposed[name].append(spent[True] - spent[False])
                self.busy[name].append((busy[True] - busy[False]) * 1e3)
                single.append(spent[False] / steps[name])
        self.step_ms = statistics.median(single)
        trainer.should_stop = True
        while True:
            yield


def timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1e3


def quartiles(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--layers", type=int, default=12, help="12: 600 MB")
    parser.add_argument("--tokens", type=int, default=64, help="length of a step's two sequences")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go; default: a temporary folder")
    parser.add_argument("--killed", action="store_true", help="kill runs at every file event, with ckpt-chaos")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    if options.killed:
        killed(folder, options.write)
        return
    saver = SaveCheckpoints(folder=folder / "ours", every=None)
    peer = AsyncCheckpointIO(TorchCheckpointIO())

    def save_with_peer(trainer: L.Trainer) -> None:
        peer.save_checkpoint(trainer_internals.dump_checkpoint(trainer), folder / "peer.ckpt")

    def wait_for_peer(_: L.Trainer) -> None:
        peer.teardown()
        peer._executor, peer._error = None, None

    bench = Bench(
        options.pairs,
        {
            "SaveCheckpoints": (lambda trainer: void(saver.save(trainer)), lambda _: void(saver.wait())),
            "Lightning AsyncCheckpointIO (not durable)": (save_with_peer, wait_for_peer),
        },
    )
    try:
        trainer = L.Trainer(
            max_steps=100_000,
            accelerator="cpu",
            callbacks=[bench, saver],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Transformer(options.layers), DataLoader(Batches(options.tokens), batch_size=None))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = table(bench)
    print(text)
    if options.write:
        _, rest = parts()
        PAGE.write_text(page(text, options) + rest, encoding="utf-8")


def killed(folder: Path, write: bool) -> None:
    """Kill runs at every file event of their saves, and print what came of it."""
    from hostile_suite import boundaries

    try:
        results = {name: boundaries.run(name, folder / name) for name in boundaries.SAVERS}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = [
        f"{KILLED}{date.today().isoformat()}, Lightning {L.__version__}, ckpt-chaos {version('ckpt-chaos')}. Made by",
        "\n    python benchmarks/checkpoint.py --killed --write\n",
        "A run of 24 steps saves after every 8. It is killed at every file event under its folder: before the event,",
        "with the file cut to half, and with all data lost that was not synced. Then it is resumed, by",
        '`ckpt_path=folder` or `ckpt_path="last"`; both have ResumeExactly. ckpt-chaos judges: PASS means the weights',
        "of an uninterrupted run, from the newest complete checkpoint; HARD_FAIL that the resumed run raises an",
        "exception; SILENT_DIVERGENCE other weights; LOST_WORK that it resumed from an older checkpoint although a",
        "newer complete one exists.\n",
        *boundaries.table(results),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    for name, points in results.items():
        for point in points:
            if point.verdict != "PASS":
                print(f"{name}: {point.name}: {point.verdict} {point.problem}")
    if write:
        first, _ = parts()
        PAGE.write_text(first + text, encoding="utf-8")


def parts() -> tuple[str, str]:
    """The page of results as it is: what `main` writes, and what `killed` adds."""
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    first, mark, rest = before.partition(KILLED)
    return first, mark + rest


def void(_: object) -> None:
    pass


def table(bench: Bench) -> str:
    memcpy = statistics.median(bench.memcpy)
    lines = [
        f"{bench.nbytes / 1e6:.0f} MB in one checkpoint; step {bench.step_ms:.0f} ms; {bench.pairs} pairs of windows",
        "",
        "| what | ms: median (quartiles) | ratio to memcpy | required |",
        "|---|---|---|---|",
        f"| memcpy of the same bytes, 1 thread | {quartiles(bench.memcpy)} | 1 | |",
        f"| copy into the snapshot's buffers | {quartiles(bench.copy)} "
        f"| {statistics.median(bench.copy) / memcpy:.2f} | 1.1 |",
    ]
    for name in bench.saves:
        ours = name == "SaveCheckpoints"
        stall, exposed = bench.stall[name], bench.exposed[name]
        lines.append(f"| {name}: stall | {quartiles(stall)} | {statistics.median(stall) / memcpy:.2f} | |")
        lines.append(
            f"| {name}: exposed, stall and slow-down | {quartiles(exposed)} "
            f"| {statistics.median(exposed) / memcpy:.2f} | {'2' if ours else ''} |"
        )
        lines.append(
            f"| {name}: the same in processor time of the training thread | {quartiles(bench.busy[name])} "
            f"| {statistics.median(bench.busy[name]) / memcpy:.2f} | |"
        )
    for name, rests in bench.durable.items():
        if rests:
            lines.append(f"\n{name}: in {len(rests)} of {bench.pairs} windows the write took longer than the window.")
    return "\n".join(lines)


def page(text: str, options: argparse.Namespace) -> str:
    return (
        f"# Cost of a durable checkpoint\n\n{date.today().isoformat()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}, 1 torch thread. Made by\n\n"
        f"    python benchmarks/checkpoint.py --write --pairs {options.pairs}\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
