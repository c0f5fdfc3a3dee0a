"""What a plan says against what happens: operations by hand, memory as allocated, the time of a whole run.

    python benchmarks/plan.py            print the tables (about 3 minutes on 2 cores)
    python benchmarks/plan.py --write    also write benchmarks/results/plan.md

Memory: a GPT is planned, and trained by Lightning on the CPU while torch's profiler records every allocation of two
steps; added to what was held before them, the largest sum is the peak. Time: `char_gpt` is planned with
``--measure 20``, and then trained to its end.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import lightning.pytorch as pl
import torch
from machine import measured
from planned_runs import Again, arguments
from torch.profiler import ProfilerActivity, profile

from stabletrain.planning.estimate import estimate
from stabletrain.planning.flops import count_flops
from stabletrain.planning.parts import Parts
from stabletrain.runtime.internals.shards import held_bytes
from stabletrain.workloads import CharGPT

ROOT = Path(__file__).parents[1]
SIZES = {"2 x 128, context 64": (2, 4, 128, 64, 32), "4 x 512, context 64": (4, 8, 512, 64, 16),
         "2 x 128, context 512": (2, 4, 128, 512, 8)}  # fmt: skip
"""Layers, heads, width, context, and rows of a batch; the first one is that of char_gpt."""
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
}
VOCABULARY = 84


class Tokens(pl.LightningDataModule):
    """Random tokens."""

    def __init__(self, rows: int, context: int) -> None:
        super().__init__()
        self.rows, self.context = rows, context

    def train_dataloader(self) -> Again:
        """One batch again and again."""
        return Again(torch.randint(0, VOCABULARY, (self.rows, self.context + 1)))


class RecordAllocations(pl.Callback):
    """Records the allocations of the second and third step, and what was held when they began.

    The third one begins with the gradients of the second, as every step of a run does but the first.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._profiler: Any = None
        self._held = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Begin after the first step, which has made the optimizer's state; end after the third."""
        if batch_idx == 0:
            state = [t for s in trainer.optimizers[0].state.values() for t in s.values() if torch.is_tensor(t)]
            for p in pl_module.parameters():  # the profiler would miss that what was there before it is freed
                p.grad = None
            self._held = held_bytes([*pl_module.parameters(), *pl_module.buffers(), *state, batch])
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()
        elif batch_idx == 2:
            self._profiler.__exit__(None, None, None)
            self.peak = self._held + _largest_sum(self._profiler)


def _largest_sum(profiler: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    memory = sorted((e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e.get("name") == "[memory]")
    total = largest = 0
    for _, _, size in memory:
        total += size
        largest = max(largest, total)
    return largest


def module_of(size: tuple[int, ...], make: Callable[..., torch.optim.Optimizer]) -> CharGPT:
    """A GPT with an optimizer."""
    layers, heads, width, context, _ = size
    torch.manual_seed(0)
    made = CharGPT(layers, heads, width, context, VOCABULARY, sample_length=0)
    made.configure_optimizers = lambda: make(made.parameters())  # type: ignore[method-assign]
    return made


def operations(name: str) -> str:
    """A row: counted and by hand."""
    layers, _, width, context, rows = size = SIZES[name]
    parts = lambda _: Parts(module_of(size, OPTIMIZERS["SGD"]), Tokens(rows, context), arguments("single", 1, {}), [])  # noqa: E731
    found = count_flops(parts)
    tokens = rows * context
    by_hand = 6 * tokens * (12 * layers * width**2 + VOCABULARY * width) + 12 * layers * width * context * tokens
    whole = sum(p.numel() for p in module_of(size, OPTIMIZERS["SGD"]).parameters())
    ratio, share = found.micro_batch / by_hand, found.attention / found.micro_batch
    six = 6 * whole * tokens / found.micro_batch
    without = 6 * (whole - found.embeddings) * tokens / found.micro_batch
    cells = (name, f"{found.micro_batch:,}", f"{by_hand:,}", f"{ratio:.4f}", f"{share:.1%}", f"{six:.3f}")
    return f"| {' | '.join((*cells, f'{without:.3f}'))} |"


def memory(name: str, optimizer: str) -> str:
    """A row: the peak as planned and as allocated."""
    *_, context, rows = size = SIZES[name]
    make = OPTIMIZERS[optimizer]
    parts = lambda _: Parts(module_of(size, make), Tokens(rows, context), arguments("single", 1, {}), [])  # noqa: E731
    plan = estimate("gpt", 1, 1, parts, str)
    record = RecordAllocations()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, callbacks=[record], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module_of(size, make), datamodule=Tokens(rows, context))
    peak = plan.per_rank.peak or 0
    return f"| {name} | {optimizer} | {peak:,} | {record.peak:,} | {peak / record.peak - 1:+.2%} |"


def run(*words: str, folder: str) -> str:
    """Run a command of stabletrain, and return what it prints."""
    command = [sys.executable, "-m", "stabletrain", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800, cwd=folder).stdout


def time_of_run(changes: list[str]) -> list[str]:
    """Sentences about the time of char_gpt from 20 steps, and of the run.

    Args:
        changes: overrides of both.
    """
    with tempfile.TemporaryDirectory() as folder:
        printed = run("plan", "char_gpt", "logger=none", *changes, "--measure", "20", "--json", folder=folder)
        plan = json.loads(printed)["jobs"][0]["plan"]
        logger = ["logger=none", "logger._target_=lightning.pytorch.loggers.CSVLogger", "logger.save_dir=csv"]
        run("train", "char_gpt", *changes, *logger, "run_dir=run", folder=folder)
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
        (file,) = Path(folder).rglob("metrics.csv")
        rows = list(csv.DictReader(file.open(encoding="utf-8")))
        points = [(int(row["step"]), float(row["throughput/step_s"])) for row in rows if row.get("throughput/step_s")]
    steps, found = plan["steps"], plan["measured"]
    ends = [0, *(step + 1 for step, _ in points)]
    real = sum(each * (end - begin) for (_, each), begin, end in zip(points, ends, ends[1:], strict=False))
    real *= steps / ends[-1]
    expected = found["hours"] * 3600
    spread = (found["high"] - found["low"]) / found["seconds"]
    return [
        f"From 20 steps: {found['seconds'] * 1000:.1f} ms a step (half of them within {spread:.0%} of the median), so "
        f"{expected:.1f} s for {steps} steps. The run's {steps} steps took {real:.1f} s: the plan is off by "
        f"{expected / real - 1:+.1%}. With start, validation, checkpoints and sample the run took "
        f"{result['seconds']:.1f} s.",
    ]


def main() -> None:
    """Print the tables, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--steps", type=int, default=1500, help="of the run of char_gpt; 0: none")
    given = parser.parse_args()
    write, changes = given.write, [] if given.steps == 1500 else [f"trainer.max_steps={given.steps}"]
    lines = [
        "# Plans", "", f"{measured()}. The machine was shared.", "",
        f"    python benchmarks/plan.py{' --write' if write else ''}{f' --steps {given.steps}' if changes else ''}", "",
        "Operations of a step of a GPT, forward and backward. By hand: six for each token and weight of a matrix, and "
        "12 x layers x width x context for each token (attention, without deducting the causal mask).", "",
        "| GPT | counted | by hand | ratio | attention | 6 N D / counted | without embeddings |",
        "|---|---|---|---|---|---|---|",
        *map(operations, SIZES), "",
        "Largest memory of a step: of the plan, traced without memory, and from the profiler's record of allocations "
        "of a real one; bytes.", "",
        "| GPT | optimizer | plan | allocated | difference |",
        "|---|---|---|---|---|",
        *(memory(name, optimizer) for name in SIZES for optimizer in OPTIMIZERS),
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    if given.steps:
        lines += ["", f"The time of `{' '.join(['char_gpt', *changes])}`:", "", *time_of_run(changes)]
    text = "\n".join(lines) + "\n"
    print(lines[-1])
    if write:
        (ROOT / "benchmarks" / "results" / "plan.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
