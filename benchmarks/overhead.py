"""Overhead of stabletrain: microseconds and ratios, each relative to a baseline in the same run.

    python benchmarks/overhead.py            print the table (about 8 minutes on 2 cores)
    python benchmarks/overhead.py --only tiny_mlp
    python benchmarks/overhead.py --write    also write benchmarks/results/overhead.md

Fits are compared in processes that take turns of a few dozen steps (`baton`): a low quantile of all steps, and next to
it what is not done at every step. The other parts interleave: every round runs each case once, differences are taken
within a round, and the median over rounds is reported. The peers that are not installed are left out
(``pip install accelerate``, ``pip install -e '.[peers]'``).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from baton import QUANTILE
from machine import measured
from overhead_suite import steps
from overhead_suite.tables import Row, table
from overhead_suite.training import Batches, TinyMLP, fit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import stabletrain as st
from stabletrain.core.limits import Bound, Limits, SkipNonFinite
from stabletrain.runtime import gradients
from stabletrain.runtime.guard import device_limits
from stabletrain.runtime.guard.signals import SignalCopy, Signals

PAGE = Path(__file__).parent / "results" / "overhead.md"


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


class FromThirdStep(L.Callback):
    """Begins to count with the third step: the first ones are looked at more closely, once in a fit."""

    def __init__(self, counter: CountReads) -> None:
        self.counter = counter

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            self.counter.reads.clear()


def host_reads(number: int = 100) -> list[Row]:
    data = DataLoader(Batches(number), batch_size=None)
    counts = {}
    for name, callbacks in (("bare", []), ("stack", [*steps.without_rollback(), st.Guard(mode="device")])):
        waits = SignalCopy.waits
        with CountReads() as counter:
            fit(TinyMLP(fused=True), data, [*callbacks, FromThirdStep(counter)], log_every_n_steps=10**6)
        counts[name] = (sum(counter.reads.values()), SignalCopy.waits - waits)
    ours = (counts["stack"][0] - counts["bare"][0]) / (number - 2)
    what = "reads of the device by the host per step, device mode forced on the CPU, from the third step, no rollback"
    return [
        Row(what, f"{ours:g}", "0"),
        Row(
            "waits on the outcome's copy per step (queued behind the next backward)", f"{counts['stack'][1] / number:g}"
        ),
    ]


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


def page(rows: list[Row], rounds: int) -> str:
    return (
        f"# Overhead\n\n{measured()}. Fits: the {100 * QUANTILE:.0f} % quantile of all steps, in processes that take "
        f"turns; spread: standard error. Other parts: medians of {rounds} interleaved rounds; spread: quartiles. The "
        f"machine was shared.\n\n    python benchmarks/overhead.py --rounds {rounds} --write\n\n{table(rows)}\n"
    )


PARTS = {**{part.__name__: part for part in steps.PARTS}, "optimizer_step": optimizer_step, "host_reads": host_reads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part of the table; may be repeated")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/overhead.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows: list[Row] = []
    for name in arguments.only or PARTS:
        with contextlib.redirect_stderr(None):
            part = PARTS[name]
            rows += optimizer_step(arguments.rounds) if part is optimizer_step else part()  # type: ignore[operator]
    print(table(rows))
    if arguments.write:
        PAGE.write_text(page(rows, arguments.rounds))


if __name__ == "__main__":
    main()
