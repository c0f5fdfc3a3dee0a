"""AdamW with its state in 8 bits on a GPT of 12 million parameters: size of the state, and loss, against 32 bits.

    python benchmarks/eight_bits.py            3 seeds, 300 steps each (about 15 minutes on one core)
    python benchmarks/eight_bits.py --write    also write benchmarks/results/eight_bits.md

The network is the recipe char_gpt's with layers=6, heads=6, width=408, context=256; it learns Shakespeare in batches of
4 times 64 characters, small enough for a CPU, with AdamW's usual settings (lr 3e-4 after 20 steps of warm-up, betas 0.9
and 0.95, weight decay 0.1 but not on embeddings, norms and biases). Both optimizers see the same initial weights and
batches; the seed changes both.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import measured
from optimizers import groups, state_bytes

from stabletrain import AdamW8bit
from stabletrain.workloads import ShakespeareData
from stabletrain.workloads.gpt import GPT

STEPS, WARMUP, LAST, SEEDS = 300, 20, 20, (0, 1, 2)
BATCH, CONTEXT, VOCABULARY, RATE = 4, 64, 84, 3e-4
MOST_STATE, MOST_LOSS = 0.30, 0.01
SETTINGS: dict[str, Any] = {"lr": RATE, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Run(NamedTuple):
    """The outcome of one training.

    Args:
        loss: mean of the last 20 steps, nats.
        state: bytes of optimizer state per parameter.
        parameters: their number.
        step_ms: median time of a step.
    """

    loss: float
    state: float
    parameters: int
    step_ms: float


def train(make: Callable[..., torch.optim.Optimizer], seed: int, steps: int) -> Run:
    """Train a new network.

    Args:
        make: the optimizer's class with its settings, called with parameter groups.
        seed: of weights and batches.
        steps: their number.
    """
    torch.manual_seed(seed)
    net = GPT(6, 6, 408, 256, VOCABULARY, 0.0, False, False)
    data = ShakespeareData(context=CONTEXT, batch_size=BATCH)
    data.setup("fit")
    optimizer, losses, times = make(groups(net)), [], []
    for step, batch in zip(range(steps), data.train_dataloader(), strict=False):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    assert len(losses) == steps
    parameters = sum(p.numel() for p in net.parameters())
    return Run(statistics.fmean(losses[-LAST:]), state_bytes(optimizer), parameters, 1000 * statistics.median(times))


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/eight_bits.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("stabletrain").setLevel(logging.ERROR)
    lines = [
        "| seed | loss, 32 bits | loss, 8 bits | difference | state, 32 bits | state, 8 bits | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    reached, parameters = [], 0
    for seed in SEEDS:
        wide = train(partial(torch.optim.AdamW, **SETTINGS), seed, arguments.steps)
        narrow = train(partial(AdamW8bit, **SETTINGS), seed, arguments.steps)
        print(seed, wide, narrow, file=sys.stderr, flush=True)
        off, ratio, parameters = narrow.loss / wide.loss - 1, narrow.state / wide.state, wide.parameters
        reached.append(ratio <= MOST_STATE and abs(off) <= MOST_LOSS)
        lines.append(
            f"| {seed} | {wide.loss:.4f} | {narrow.loss:.4f} | {off:+.2%} | {wide.state:.2f} | {narrow.state:.2f} | "
            f"{ratio:.3f} |"
        )
    verdict = (
        f"{parameters / 1e6:.1f} million parameters, {arguments.steps} steps. Reach: state at most {MOST_STATE:.2f} of "
        f"AdamW's, loss within {MOST_LOSS:.0%}: {'reached' if all(reached) else 'NOT reached'} with each seed. State: "
        f"bytes per parameter. Loss: nats, mean of the last {LAST} steps."
    )
    print("\n".join(lines), verdict, sep="\n\n")
    if arguments.write:
        what = (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip()
        head = f"# State in 8 bits\n\n{measured()}. `python benchmarks/eight_bits.py --write`\n\n{what}\n\n"
        page = head + "\n".join(lines) + f"\n\n{verdict}\n"
        (Path(__file__).parent / "results" / "eight_bits.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
