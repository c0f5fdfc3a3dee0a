"""What clip_qk costs a step, and which troubles it cures: two kinds of rising loss, with and without it.

    python benchmarks/clip_qk.py            print both tables (some minutes on one core)
    python benchmarks/clip_qk.py --write    also write benchmarks/results/clip_qk.md
    python benchmarks/clip_qk.py --cost     only the cost

Cost: the network of char_gpt with the batches of its recipe, bare Lightning, the guard without a plugin that acts, and
clip_qk with a limit that no logit reaches; interleaved rounds, medians over the rounds' median steps, in CPU time of
the training thread, so that other work on the machine counts less. The number of attention logits of a batch of equally
many tokens grows with the context, everything else does not.

Trouble: a GPT of two layers and width 48 on Shakespeare, 300 steps. In one kind the query and key weights are
multiplied by 1.08 before each step from step 120 on; in the other the learning rate creeps up to 200 times its value.
The loss rises at the first of 15 steps in a row whose mean over 10 steps is 0.3 nats above the lowest such mean.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from machine import measured
from torch import Tensor
from torch.utils.data import DataLoader

import stabletrain as st
from stabletrain.runtime.observing.attention import AttentionCall, AttentionCalls, largest_logit
from stabletrain.workloads import text
from stabletrain.workloads.char_gpt import CharGPT

PAGE = Path(__file__).parent / "results" / "clip_qk.md"
SHAKESPEARE = Path(text.__file__).parent / "data" / "shakespeare.txt.gz"
QKV, HEADS = r"net\.blocks\.\d+\.attention\.qkv", 4
STEPS, FROM, UNTIL = 300, 120, 280
CREEP = 200.0
GROWTH = 1.08


class Windows(torch.utils.data.Dataset[Tensor]):
    """Batch i is a function of the seed and i: windows of Shakespeare."""

    def __init__(self, seed: int, steps: int, batch_size: int, context: int) -> None:
        self.tokens = text.encode(text.read_text(SHAKESPEARE, None)[0]).long()
        self.seed, self.steps, self.batch_size, self.context = seed, steps, batch_size, context

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + i)
        starts = torch.randint(0, len(self.tokens) - self.context - 1, (self.batch_size,), generator=generator)
        return self.tokens[starts[:, None] + torch.arange(self.context + 1)]


class Net(CharGPT):
    """CharGPT whose learning rate and weights may be changed on purpose."""

    def __init__(self, trouble: str = "", beta2: float = 0.95, **options: Any) -> None:
        super().__init__(sample_length=0, **options)
        self.trouble, self.beta2 = trouble, beta2
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if not self.trouble:
            return
        factor = min(1.0, (batch_idx + 1) / 30)
        if self.trouble == "rate":
            factor *= CREEP ** min(1.0, max(0.0, (batch_idx - FROM) / (UNTIL - FROM)))
        elif batch_idx >= FROM:
            with torch.no_grad():
                for block in self.net.blocks:
                    qkv: Any = block.attention.qkv
                    qkv.weight[: 2 * qkv.out_features // 3].mul_(GROWTH)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * factor

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["betas"] = (0.9, self.beta2)
        return optimizer


class Clock(L.Callback):
    """The CPU time at the end of each batch."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.stamps.append(time.thread_time())

    def step_ms(self, skip: int = 5) -> float:
        return statistics.median(b - a for a, b in itertools.pairwise(self.stamps[skip:])) * 1e3


class LargestLogit(L.Callback):
    """The largest logit from step `FROM` on."""

    def __init__(self) -> None:
        self.found = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.calls = AttentionCalls(pl_module, self._see if batch_idx >= FROM else lambda call: None)
        self.calls.open()

    def on_before_backward(self, *_: Any) -> None:
        self.calls.close()

    def _see(self, call: AttentionCall) -> None:
        self.found = max(self.found, largest_logit(call).max().item())


def train(module: L.LightningModule, data: Windows, *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(data, batch_size=None))


def cost(rounds: int, steps: int) -> list[str]:
    """The table of the cost: a row for each context."""
    cases: dict[str, Callable[[], list[L.Callback]]] = {
        "bare": list,
        "guard": lambda: [st.Guard()],
        "clip_qk": lambda: [st.ClipQK(tau=1e6, qkv=QKV, heads=HEADS)],
    }
    lines = [
        "| context | bare, ms of CPU time per step | guard alone | clip_qk | clip_qk over the guard |",
        "|---|---|---|---|---|",
    ]
    for context in (64, 256):
        batch_size = 32 * 64 // context
        data = Windows(0, steps, batch_size, context)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, make in cases.items():
                torch.manual_seed(0)
                clock = Clock()
                train(Net(context=context), data, *make(), clock)
                times[name].append(clock.step_ms())
        bare, guard, clipped = (statistics.median(times[name]) for name in cases)
        ratios = [mine / theirs for mine, theirs in zip(times["clip_qk"], times["guard"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        over = f"{statistics.median(ratios):.2f}x ({spread})"
        lines.append(f"| {context} | {bare:.1f} | {guard:.1f} | {clipped:.1f} | {over} |")
        print(lines[-1], flush=True)
    return lines


def rises_at(losses: Sequence[float], by: float = 0.3, run: int = 15) -> int | None:
    """The step at which the loss begins to rise, as defined above; None: it does not."""
    values = [loss if math.isfinite(loss) else 20.0 for loss in losses]
    best, in_a_row = math.inf, 0
    for i in range(9, len(values)):
        mean = statistics.fmean(values[i - 9 : i + 1])
        best = min(best, mean)
        in_a_row = in_a_row + 1 if i >= 20 and mean > best + by else 0
        if in_a_row == run:
            return i - run + 1
    return None


KINDS: dict[str, dict[str, Any]] = {
    "query and key weights grow": {"trouble": "weights"},
    f"rate creeps up to {CREEP:g} times, beta2 0.95": {"trouble": "rate"},
}


def cures(seeds: Sequence[int]) -> list[str]:
    """The table of the troubles: a row for each kind and limit."""
    lines = [
        "| trouble | clip_qk | loss rises at step | loss at the end, nats | largest logit |",
        "|---|---|---|---|---|",
    ]
    for kind, options in KINDS.items():
        for tau in (None, 100.0):
            starts, ends, logits = [], [], []
            for seed in seeds:
                torch.manual_seed(seed)
                module, largest = Net(layers=2, heads=HEADS, width=48, context=24, lr=5e-3, **options), LargestLogit()
                plugins = [] if tau is None else [st.ClipQK(tau=tau, qkv=QKV, heads=HEADS)]
                train(module, Windows(seed, STEPS, 8, 24), *plugins, largest)
                starts.append(rises_at(module.losses))
                ends.append(statistics.fmean(module.losses[-10:]))
                logits.append(largest.found)
            shown = [", ".join("never" if each is None else str(each) for each in starts)]
            shown += [", ".join(f"{each:.3g}" for each in values) for values in (ends, logits)]
            lines.append(f"| {kind} | {'none' if tau is None else f'tau {tau:g}'} | {' | '.join(shown)} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the tables; write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/clip_qk.md")
    parser.add_argument("--cost", action="store_true", help="only the cost")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "stabletrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    troubles = [] if arguments.cost else cures((0, 1, 2))
    costs = cost(arguments.rounds, arguments.steps)
    if arguments.write:
        PAGE.write_text(page(costs, troubles), encoding="utf-8")


def page(costs: list[str], troubles: list[str]) -> str:
    """The result page."""
    return "\n".join(
        [
            "# clip_qk",
            "",
            f"{measured()}; the machine was shared.",
            "",
            "    python benchmarks/clip_qk.py --write",
            "",
            "## Cost of a step",
            "",
            "The network of char_gpt (2 layers, 4 heads, width 128), 2048 tokens in a batch, CPU time of one thread.",
            "The exact logits are one more product of queries and keys.",
            "",
            *costs,
            "",
            "## What it cures",
            "",
            "Three seeds each, in the order of the seeds; the loss at the end is a mean over 10 steps, in nats.",
            "",
            *troubles,
            "",
        ]
    )


if __name__ == "__main__":
    main()
