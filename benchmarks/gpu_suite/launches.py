"""Kernels that a step launches, copies to the host, and waits of the host, counted by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from overhead_suite.peers import ItemNaNCheck, ZClipRestated
from overhead_suite.tables import Row
from overhead_suite.training import Batches, TinyMLP
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from gpu_suite.place import Place
from gpu_suite.steps import STACKS, guard
from gpu_suite.training import trainer

FIRST, LAST = 33, 48
"""The steps that are counted: no snapshot is due in them, and one check of the weights."""
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_READS = ("local_scalar_dense", "is_nonzero", "aten.equal", "aten.nonzero")


class _Operators(TorchDispatchMode):
    """On a CPU, which launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.reads += any(name in str(func) for name in _READS)
        return func(*args, **(kwargs or {}))


class Counting(L.Callback):
    """Counts from the beginning of one step to the beginning of another; the first of the callbacks."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._mode: Any = None
        self.counts: tuple[float, ...] = ()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == FIRST:
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            self._mode = profile(activities=activities) if self._place.on_cuda else _Operators()
            self._mode.__enter__()
        elif batch_idx == LAST:
            self._place.synchronize()
            self._mode.__exit__(None, None, None)
            self.counts = tuple(each / (LAST - FIRST) for each in self._read())

    def _read(self) -> tuple[int, ...]:
        if isinstance(self._mode, _Operators):
            return self._mode.all, self._mode.reads
        found = [(event.key, event.count) for event in self._mode.key_averages()]
        launches = sum(count for key, count in found if key.startswith(_LAUNCHES))
        copies = sum(count for key, count in found if key.startswith("Memcpy DtoH"))
        return launches, copies, sum(count for key, count in found if key.startswith(_WAITS)) - 1  # one is ours


class ClipGradNorm(L.Callback):
    """Torch's clipping."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 1e9)


def launches(place: Place) -> list[Row]:
    """For each case what one step of a tiny network needs."""
    cases: dict[str, Callable[[], list[L.Callback]]] = {
        "bare Lightning": list,
        **{name: lambda make=make: [*make(), *guard(place)] for name, make in STACKS.items()},  # type: ignore[misc]
        "peer: clip_grad_norm_": lambda: [ClipGradNorm()],
        "peer: NaN check with .item()": lambda: [ItemNaNCheck()],
        "peer: ZClip, restated": lambda: [ZClipRestated()],
    }
    rows = []
    for name, make in cases.items():
        torch.manual_seed(0)
        counting, data = Counting(place), DataLoader(Batches(LAST + 2), batch_size=None)
        trainer(place, [counting, *make()], "32-true", max_epochs=1).fit(TinyMLP(fused=True), data)
        if place.on_cuda:
            told = "{:.1f} kernels, {:.2f} copies to the host, {:.2f} waits".format(*counting.counts)
        else:
            told = "{:.1f} operators, {:.2f} reads (on a CPU, in place of kernels)".format(*counting.counts)
        rows.append(Row(f"tiny MLP, each step: {name}", told))
    return rows
