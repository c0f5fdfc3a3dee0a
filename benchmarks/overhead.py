"""Overhead of stabletrain: ratios and microseconds, each relative to a baseline in the same run.

    python benchmarks/overhead.py            print the table (about 6 minutes on 2 cores)
    python benchmarks/overhead.py --write    also write benchmarks/results/overhead.md

Cases are interleaved: every round runs each case once, differences are taken within a round, and the median over
rounds is reported. The machine may be shared; ratios within a round depend least on that.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

import stabletrain as st
from stabletrain.core.limits import Bound, Limits, SkipNonFinite
from stabletrain.runtime import gradients
from stabletrain.runtime.guard import device_limits
from stabletrain.runtime.guard.signals import SignalCopy, Signals

Case = Callable[[], list[L.Callback]]


class Row:
    """One line of the table."""

    def __init__(self, what: str, measured: str, reach: str = "", spread: str = "") -> None:
        self.cells = (what, measured, reach, spread)


# ---- per-step cost in Lightning --------------------------------------------------------------------------------------


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches made beforehand, so that loading takes no time."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(4, 8, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(steps)
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class TinyMLP(L.LightningModule):
    """A minimal module, so that the overhead dominates the step."""

    def __init__(self, log: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.with_log, self.fused = log, fused

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).pow(2).mean()
        if self.with_log:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3, fused=self.fused, foreach=False)


class Clock(L.Callback):
    """Records the time at the end of each batch."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.stamps.append(time.perf_counter())

    def step_us(self, skip: int) -> float:
        stamps = self.stamps[skip:]
        return statistics.median(b - a for a, b in itertools.pairwise(stamps)) * 1e6


class ItemNaNCheck(L.Callback):
    """Comparison: a common check for NaN in scripts."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for p in pl_module.parameters():
            if p.grad is not None and not torch.isfinite(p.grad).all().item():
                raise RuntimeError("NaN")


class ClipGradNorm(L.Callback):
    """Comparison: torch's clipping."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 1e9)


class ZClipRestated(L.Callback):
    """Comparison: ZClip, reimplemented from its paper (arXiv 2504.02507): z-score on an EMA, reciprocal clipping."""

    def __init__(self) -> None:
        self.mean = self.var = 0.0
        self.warmup: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.sqrt(sum((g.pow(2).sum() for g in grads), torch.zeros(()))).item()
        if len(self.warmup) < 25:
            self.warmup.append(norm)
            self.mean = statistics.fmean(self.warmup)
            self.var = statistics.pvariance(self.warmup)
            return
        std = math.sqrt(self.var)
        clipped = self.mean + 2.5**2 * self.var / (norm - self.mean) if norm > self.mean + 2.5 * std else norm
        if clipped < norm:
            for g in grads:
                g.mul_(clipped / norm)
        self.mean = 0.97 * self.mean + 0.03 * clipped
        self.var = 0.97 * self.var + 0.03 * (clipped - self.mean) ** 2


def fit(module: L.LightningModule, data: Any, callbacks: list[L.Callback], **trainer: Any) -> Clock:
    clock = Clock()
    options = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "limit_val_batches": 0, **trainer}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(**options, **quiet, callbacks=[*callbacks, clock]).fit(module, data)
    return clock


def without_rollback() -> list[L.Callback]:
    return st.default_callbacks(spike="none")


def tiny_mlp(rounds: int, steps: int = 700, skip: int = 150) -> list[Row]:
    data = DataLoader(Batches(steps), batch_size=None)
    cases: dict[str, Callable[[], float]] = {
        "bare Lightning": lambda: fit(TinyMLP(), data, []).step_us(skip),
        "default stack": lambda: fit(TinyMLP(), data, st.default_callbacks()).step_us(skip),
        "default stack without rollback": lambda: fit(TinyMLP(), data, without_rollback()).step_us(skip),
        "clip_norm alone": lambda: fit(TinyMLP(), data, [st.ClipNorm()]).step_us(skip),
        "skip_nonfinite alone": lambda: fit(TinyMLP(), data, [st.SkipNonFinite()]).step_us(skip),
        "peer: one self.log": lambda: fit(TinyMLP(log=True), data, []).step_us(skip),
        "peer: NaN check with .item()": lambda: fit(TinyMLP(), data, [ItemNaNCheck()]).step_us(skip),
        "peer: clip_grad_norm_": lambda: fit(TinyMLP(), data, [ClipGradNorm()]).step_us(skip),
        "peer: ZClip, restated": lambda: fit(TinyMLP(), data, [ZClipRestated()]).step_us(skip),
        "peer: LearningRateMonitor": lambda: fit(
            TinyMLP(), data, [LearningRateMonitor("step")], logger=DummyLogger(), log_every_n_steps=50
        ).step_us(skip),
    }
    results = interleave(cases, rounds)
    bare = results.pop("bare Lightning")
    rows = [Row("tiny MLP, bare Lightning", f"{statistics.median(bare):.0f} µs per step")]
    for name, values in results.items():
        extra = [v - b for v, b in zip(values, bare, strict=True)]
        reach = "at most +150 µs" if name == "default stack" else ""
        rows.append(Row(f"tiny MLP, {name}", f"+{statistics.median(extra):.0f} µs", reach, quartiles(extra, "{:+.0f}")))
    return rows


def char_gpt(rounds: int, steps: int = 40, skip: int = 10) -> list[Row]:
    from stabletrain.workloads import CharGPT, ShakespeareData

    def run(callbacks: list[L.Callback]) -> float:
        torch.manual_seed(0)
        return fit(CharGPT(sample_length=0), ShakespeareData(), callbacks, max_epochs=-1, max_steps=steps).step_us(skip)

    results = interleave({"bare": lambda: run([]), "stack": lambda: run(st.default_callbacks())}, rounds)
    ratios = [s / b for s, b in zip(results["stack"], results["bare"], strict=True)]
    bare = statistics.median(results["bare"]) / 1000
    what = f"char_gpt ({bare:.1f} ms per step), default stack over bare Lightning"
    return [Row(what, f"{statistics.median(ratios):.4f}x", "at most 1.01x", quartiles(ratios, "{:.4f}"))]


# ---- the step itself -------------------------------------------------------------------------------------------------


def optimizer_step(rounds: int) -> list[Row]:
    """Measure norm, clip and fused AdamW over 12 M parameters in 60 tensors."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(200_000)) for _ in range(60)]
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    loss = torch.ones(())
    loose = Limits.of(Bound(1e9, 1e9), SkipNonFinite())

    def theirs() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        optimizer.step()

    def exact() -> None:
        grads = gradients.of(parameters)
        norm = gradients.global_norm(grads).item()
        clipped = math.nan if loose.skips_step(loss.item(), norm) else loose.clip(norm)
        if clipped < norm:
            gradients.scale_(grads, clipped / norm)
        optimizer.step()

    def device() -> None:
        norm = gradients.global_norm(gradients.of(parameters))
        decision = device_limits.decide(loose, loss, norm, norm)
        optimizer.grad_scale, optimizer.found_inf = decision  # type: ignore[attr-defined]
        copy = Signals(loss, norm, norm).start_copy()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        copy.read()

    def timed(step: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        return run

    cases = {"theirs": timed(theirs), "exact": timed(exact), "device": timed(device)}
    results = interleave(cases, 25 * rounds)
    what = "norm + clip + fused AdamW, 12 M parameters, over clip_grad_norm_ + step"
    rows = []
    for name, label, reach in (
        ("exact", "exact mode, nothing to clip", "at most 0.88x"),
        ("device", "device mode", "at most 0.95x"),
    ):
        ratios = [m / t for m, t in zip(results[name], results["theirs"], strict=True)]
        rows.append(Row(f"{what}: {label}", f"{statistics.median(ratios):.3f}x", reach, quartiles(ratios, "{:.3f}")))
    return rows


# ---- reads from the device -------------------------------------------------------------------------------------------


class CountReads(TorchDispatchMode):
    """Counts the operations with which the host reads a device tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name or name.startswith("aten.equal"):
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def host_reads(steps: int = 100) -> list[Row]:
    data = DataLoader(Batches(steps), batch_size=None)
    counts = {}
    for name, callbacks in (("bare", []), ("stack", [*without_rollback(), st.Guard(mode="device")])):
        waits = SignalCopy.waits
        with CountReads() as counter:
            fit(TinyMLP(fused=True), data, callbacks, log_every_n_steps=10**6)
        counts[name] = (sum(counter.reads.values()), SignalCopy.waits - waits)
    ours = (counts["stack"][0] - counts["bare"][0]) / steps
    what = f"reads of the device by the host per step, device mode forced on the CPU, {steps} steps, without rollback"
    return [
        Row(what, f"{ours:g}", "0"),
        Row(
            "waits on the outcome's copy per step (queued behind the next backward)", f"{counts['stack'][1] / steps:g}"
        ),
    ]


# ---- the command line ------------------------------------------------------------------------------------------------


def command_line(rounds: int) -> list[Row]:
    rows = []
    command = str(Path(sys.executable).with_name("stabletrain"))
    for arguments in (["--help"], ["ls"]):
        seconds = []
        for _ in range(max(3, rounds)):
            start = time.perf_counter()
            subprocess.run([command, *arguments], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        label = f"`stabletrain {' '.join(arguments)}`"
        rows.append(Row(label, f"{statistics.median(seconds):.2f} s", "under 0.5 s", quartiles(seconds, "{:.2f}")))
    return rows


# ---- the table -------------------------------------------------------------------------------------------------------


def interleave(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    results: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():  # one round to warm up
        run()
    for _ in range(rounds):
        for name, run in cases.items():
            results[name].append(run())
    return results


def quartiles(values: list[float], form: str) -> str:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return f"{form.format(low)} to {form.format(high)}"


def table(rows: list[Row]) -> str:
    lines = ["| what | measured | required | quartiles |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row.cells) + " |" for row in rows])


def page(rows: list[Row], rounds: int) -> str:
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    return (
        f"# Overhead\n\nMeasured {date.today().isoformat()} on {machine}, {torch.get_num_threads()} thread, Lightning "
        f"{L.__version__}. Medians of {rounds} interleaved rounds; the machine was shared.\n\n"
        f"    python benchmarks/overhead.py --rounds {rounds} --write\n\n{table(rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--only", choices=[f.__name__ for f in PARTS], help="one part of the table")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/overhead.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows: list[Row] = []
    for part in PARTS:
        if arguments.only in (None, part.__name__):
            with contextlib.redirect_stderr(None):
                rows += part() if part is host_reads else part(arguments.rounds)  # type: ignore[operator]
    print(table(rows))
    if arguments.write:
        target = Path(__file__).parent / "results" / "overhead.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(page(rows, arguments.rounds))


PARTS = (tiny_mlp, char_gpt, optimizer_step, host_reads, command_line)

if __name__ == "__main__":
    main()
