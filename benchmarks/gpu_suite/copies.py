"""Snapshots, restores and durable checkpoints of the GPT, compared with plain copies of as many bytes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from overhead_suite.tables import Row

import stabletrain as st
from gpu_suite.place import Place
from gpu_suite.steps import guard, spread, timed
from gpu_suite.training import train
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.snapshots.overlap import Overlap
from stabletrain.runtime.snapshots.snapshot import Snapshot

_PLAIN = 1 << 30
"""Most bytes of the plain copy."""


class Blocks(GuardMember):
    """Times blocks of steps of one fit, each with something at its beginning.

    Args:
        place: the device.
        saver: saves checkpoints when it is asked to.
    """

    def __init__(self, place: Place, saver: st.SaveCheckpoints) -> None:
        self.place, self.saver = place, saver
        self.seconds: dict[str, list[float]] = {}
        self.alone: dict[str, list[float]] = {}
        self.bytes = 0
        self._plan: Iterator[None] | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        if self._plan is None:
            self._plan = self._blocks(trainer)
        next(self._plan, None)

    def _blocks(self, trainer: L.Trainer) -> Iterator[None]:
        mine = self._guard
        assert mine is not None
        yield  # the optimizer's state exists now
        overlap = Overlap()
        waiting, beside = Snapshot(), Snapshot(overlap=overlap)
        waiting.prepare(mine)
        for _ in range(5):  # the first ones are complete at once, to see whether only the update changes weights
            beside.capture(mine, None)
            yield
        self.bytes = beside.nbytes
        few, many = (4, 10) if self.place.on_cuda else (1, 1)
        cases: list[tuple[str, int, Callable[[], Any]]] = [
            ("nothing", few, lambda: None),
            ("waiting", few, lambda: waiting.capture(mine, None)),
            ("beside", few, lambda: beside.capture(mine, None)),
            ("longer nothing", many, lambda: None),
            ("checkpoint", many, lambda: self.saver.save(trainer)),
        ]
        for round_ in range(self.place.rounds + 1):
            for name, steps, begin in cases:
                self.place.synchronize()
                began = time.perf_counter()
                begin()
                for _ in range(steps):
                    yield
                self.place.synchronize()
                if round_:
                    self.seconds.setdefault(name, []).append(time.perf_counter() - began)
                self.saver.wait()
        for _ in range(self.place.repeats // 4 + 1):
            self.alone.setdefault("restore", []).append(timed(self.place, lambda: waiting.restore(mine, None, None)))
        overlap.close()
        trainer.should_stop = True

    def exposed(self, name: str, without: str = "nothing") -> list[float]:
        """The seconds that something adds to a block, in each round."""
        return [mine - other for mine, other in zip(self.seconds[name], self.seconds[without], strict=True)]


def copies(place: Place, batch: int) -> list[Row]:
    """What training waits for, in units of a plain copy."""
    with tempfile.TemporaryDirectory() as folder:
        blocks = Blocks(place, st.SaveCheckpoints(Path(folder) / "checkpoints", every=None))
        callbacks = [*st.default_callbacks(spike="none"), *guard(place), blocks, blocks.saver]
        train(place, callbacks, batch, default_root_dir=folder, enable_checkpointing=True)
    out, back = plain_rates(place, min(blocks.bytes, _PLAIN))
    size = f"{blocks.bytes / 1e9:.2f} GB"
    rows = [
        Row("plain copy from the device to page-locked memory, and back", f"{out / 1e9:.1f} and {back / 1e9:.1f} GB/s"),
        _row(f"snapshot of {size}, training waits", blocks.exposed("waiting"), blocks.bytes / out, "at most 1.2x"),
        _row("snapshot beside the next steps", blocks.exposed("beside"), blocks.bytes / out, "at most 0.2x"),
        _row("restore", blocks.alone["restore"], blocks.bytes / back, "at most 1.2x"),
    ]
    saved = blocks.exposed("checkpoint", "longer nothing")
    return [*rows, _row("durable checkpoint, all that it adds", saved, blocks.bytes / out, "at most 2x")]


def plain_rates(place: Place, size: int) -> tuple[float, float]:
    """Bytes per second of one copy from the device to page-locked memory, and back."""
    theirs = torch.zeros(size, dtype=torch.uint8, device=place.device)
    ours = torch.zeros(size, dtype=torch.uint8, pin_memory=place.on_cuda)
    seconds = [
        [timed(place, lambda a=a, b=b: a.copy_(b, non_blocking=True)) for _ in range(5)]  # type: ignore[misc]
        for a, b in ((ours, theirs), (theirs, ours))
    ]
    out, back = (size / statistics.median(each) for each in seconds)
    return out, back


def _row(what: str, seconds: list[float], plain: float, reach: str) -> Row:
    ratios = [each / plain for each in seconds]
    usual = statistics.median(seconds)
    told = f"{statistics.median(ratios):.2f}x of the copy ({usual * 1e3:.1f} ms)"
    return Row(what, told, reach, spread(ratios, "{:.2f}"))
