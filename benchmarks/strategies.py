"""Strategies on two processes: bytes per process, collectives per step, and what the default stack adds to a step.

    python benchmarks/strategies.py            print the tables (about 3 minutes on 2 cores)
    python benchmarks/strategies.py --write    also write benchmarks/results/strategies.md

Two gloo processes on the CPU train char_gpt. Bytes are those of parameters, gradients and optimizer state that one
process holds when the optimizer steps. A collective is counted where torch dispatches it, over all steps but the first
two. Times: bare and with the default stack in turn, a ratio within each round, the median over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from machine import measured
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import stabletrain as st

PROCESSES = 2
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda: st.FSDP2Strategy(process_group_backend="gloo"),
    "zero2": lambda: st.FSDP2Strategy(process_group_backend="gloo", reshard_after_forward=False),
}
WITHOUT = ("wait", "wrap_tensor", "barrier")


class Count(TorchDispatchMode):
    """Counts collectives by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and not any(each in name for each in WITHOUT):
            self.kinds[name.split(".")[1].strip("_")] += 1
        return func(*args, **(kwargs or {}))


class Observe(L.Callback):
    """Records times of batches, the bytes at an optimizer's step, and counts collectives after two steps."""

    def __init__(self, count: Count | None = None) -> None:
        self.stamps: list[float] = []
        self.bytes: dict[str, int] = {}
        self.count, self.before = count, Counter[str]()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            state = [each for values in optimizer.state.values() for each in values.values()]
            tensors = {"parameters": list(pl_module.parameters()), "gradients": gradients, "optimizer": state}
            self.bytes = {name: sum(map(local_bytes, each)) for name, each in tensors.items()}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stamps.append(time.perf_counter())
        if self.count is not None and len(self.stamps) == 2:
            self.before = Counter(self.count.kinds)


def local_bytes(value: Any) -> int:
    """Bytes that a tensor takes in this process."""
    if not isinstance(value, Tensor):
        return 0
    mine = value.to_local() if isinstance(value, DTensor) else value
    return mine.numel() * mine.element_size()


def fit(strategy: str, stack: bool, steps: int, folder: str, count: Count | None = None) -> Observe:
    from stabletrain.workloads import CharGPT, ShakespeareData

    torch.manual_seed(0)
    observe = Observe(count)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy=STRATEGIES[strategy](),
        callbacks=[*(st.default_callbacks() if stack else []), observe],
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**6,
        default_root_dir=folder,
    )
    trainer.fit(CharGPT(sample_length=0), ShakespeareData())
    return observe


def step_ms(observe: Observe, skip: int = 10) -> float:
    stamps = observe.stamps[skip:]
    return statistics.median(b - a for a, b in itertools.pairwise(stamps)) * 1e3


def measure(rounds: int, steps: int, folder: str) -> dict[str, Any]:
    """What one rank measures."""
    found: dict[str, Any] = {}
    for name in STRATEGIES:
        counts = {}
        for stack in (False, True):
            with Count() as count:
                observe = fit(name, stack, 12, folder, count)
            counts[stack] = {key: (n - observe.before[key]) / 10 for key, n in count.kinds.items()}
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for stack, values in times.items():
                values.append(step_ms(fit(name, stack, steps, folder)))
        ratios = [with_it / bare for bare, with_it in zip(times[False], times[True], strict=True)]
        found[name] = {
            "bytes": observe.bytes,
            "bare": counts[False],
            "stack": counts[True],
            "bare_ms": statistics.median(times[False]),
            "ratios": ratios,
        }
    return found


def tables(found: dict[str, Any]) -> str:
    whole = sum(found["ddp"]["bytes"].values())
    lines = ["| strategy | parameters | gradients | optimizer state | all, against ddp |", "|---|---|---|---|---|"]
    for name, each in found.items():
        sizes = [f"{each['bytes'][kind]:,}" for kind in ("parameters", "gradients", "optimizer")]
        lines.append(f"| `{name}` | {' | '.join(sizes)} | {sum(each['bytes'].values()) / whole:.3f} |")
    lines += ["", "| strategy | collectives per step, bare | with the default stack | more |", "|---|---|---|---|"]
    for name, each in found.items():
        bare, stack = ({k: v for k, v in each[kind].items() if v} for kind in ("bare", "stack"))
        more = sum(stack.values()) - sum(bare.values())
        lines.append(f"| `{name}` | {named(bare)} | {named(stack)} | {more:g} |")
    lines += ["", "| strategy | bare, ms per step | default stack over bare | quartiles |", "|---|---|---|---|"]
    for name, each in found.items():
        low, middle, high = statistics.quantiles(each["ratios"], n=4)
        lines.append(f"| `{name}` | {each['bare_ms']:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines) + "\n"


def named(counts: dict[str, float]) -> str:
    return f"{sum(counts.values()):g} ({', '.join(f'{v:g} {k}' for k, v in sorted(counts.items()))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of times (default 7)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a fit that is timed (default 40)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/strategies.md")
    parser.add_argument("--result", help=argparse.SUPPRESS)  # of a rank: the file for what it has measured
    arguments = parser.parse_args()
    if arguments.result:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(arguments.rounds, arguments.steps, folder)
        Path(arguments.result).write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may still run
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        shared = {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES), "GROUP_RANK": "0", "NODE_RANK": "0"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
        options = ["--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
        running = [
            subprocess.Popen(
                [sys.executable, __file__, *options, "--result", f"{folder}/{rank}.json"],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(PROCESSES)
        ]
        if any(each.wait() for each in running):
            raise SystemExit("a rank has failed")
        found = json.loads(Path(folder, "0.json").read_text())
    text = tables(found)
    print(text)
    if arguments.write:
        head = (
            f"# Strategies\n\n{measured()}. {PROCESSES} processes, gloo, {arguments.rounds} rounds of "
            f"{arguments.steps} steps; the machine was shared.\n\n    python benchmarks/strategies.py --rounds "
            f"{arguments.rounds} --steps {arguments.steps} --write\n\n"
        )
        (Path(__file__).parent / "results" / "strategies.md").write_text(head + text)


if __name__ == "__main__":
    main()
