"""check_replicas: flipped bits that are found, false alarms, and what a check costs.

    python benchmarks/replicas.py            print the tables (about 5 minutes on 2 cores)
    python benchmarks/replicas.py --write    also write benchmarks/results/replicas.md

Three gloo processes on the CPU train a small network with DDP and AdamW. In each trial one bit of one weight or moment
of one process is flipped before a step, and the next check has to name the process and the tensor; then all processes
get the state from before the first trial again, and the next one begins. The cost is measured with char_gpt on two
processes, by the processor time of rank 0, since the machine may be shared: of one check over one step, and of whole
fits in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from machine import measured
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stabletrain as st
from stabletrain.runtime.guard.bit_sums import bit_sums

EVERY = 5
"""Steps between checks in the trials."""
SEED = 0


class Small(L.LightningModule):
    """A perceptron with parameters of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.net = nn.Sequential(nn.Linear(9, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        seed = 10 * self.trainer.fit_loop.epoch_loop.total_batch_idx + self.global_rank
        x = torch.randn(8, 9, generator=torch.Generator().manual_seed(seed))
        loss: Tensor = (self.net(x) - x[:, :5]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Trials(L.Callback):
    """Flips one bit in the course of every interval between two checks, and records what the events say."""

    def __init__(self, trials: int, check: Any) -> None:
        self.trials, self.check = trials, check
        self.draw = random.Random(SEED)
        self.planned: tuple[int, int] | None = None  # rank and batch
        self.batch = -1
        self.clean: tuple[Any, Any] | None = None
        self.done: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch += 1  # each is an attempted step
        if self.batch and self.batch % EVERY == 0:
            optimizer = trainer.optimizers[0]
            if self.clean is None:
                self.clean = copy.deepcopy((pl_module.state_dict(), optimizer.state_dict()))
            else:  # a huge weight has damaged all copies, also those that are equal
                pl_module.load_state_dict(self.clean[0])
                optimizer.load_state_dict(copy.deepcopy(self.clean[1]))
            if len(self.done) < self.trials:
                self.planned = (self.draw.randrange(trainer.world_size), self.batch + self.draw.randrange(EVERY))
        if self.planned is None or self.batch != self.planned[1]:
            return
        rank, self.planned = self.planned[0], None
        name, p = self.draw.choice(list(pl_module.named_parameters()))
        kind = self.draw.choice(["weight", "exp_avg", "exp_avg_sq"])
        tensor = p if kind == "weight" else trainer.optimizers[0].state[p][kind]
        element, bit = self.draw.randrange(tensor.numel()), self.draw.randrange(32)
        if trainer.global_rank == rank:
            bits = tensor.detach().view(-1).view(torch.int32)
            bits[element : element + 1] ^= torch.ones(1, dtype=torch.int32) << bit
        label = name if kind == "weight" else f"{kind} of {name}"
        self.done.append(
            {"rank": rank, "tensor": label, "bit": bit, "step": self.batch, "found": False, "named": False}
        )

    def on_stability_event(self, trainer: Any, module: Any, event: Any) -> None:
        if event.kind != "replicas_differ" or not self.done:
            return
        trial = self.done[-1]
        trial["found"] = event.step < trial["step"] // EVERY * EVERY + EVERY
        trial["named"] = f"on rank {trial['rank']} (host" in event.reason and trial["tensor"] in event.reason
        self.check.reset()  # else the second difference of a rank ends the run


class Stamps(L.Callback):
    """Processor time of this process after each batch."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.stamps.append(time.process_time())


def fit(module: L.LightningModule, data: Any, steps: int, folder: str, *callbacks: L.Callback) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=DDPStrategy(process_group_backend="gloo"),
        callbacks=list(callbacks),
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**6,
        default_root_dir=folder,
        use_distributed_sampler=isinstance(module, Small) is False,
    )
    trainer.fit(module, data)
    return trainer


def trials(number: int, healthy: int, folder: str) -> dict[str, Any]:
    """On three ranks: the trials, and the alarms of a run without a fault."""
    data = DataLoader(torch.zeros(10**6, 1))
    check = st.CheckReplicas(every=EVERY, on_difference="repair")
    seen = Trials(number, check)
    keep_going = st.SkipNonFinite(max_in_a_row=10 * EVERY)  # a NaN that is applied makes all copies alike
    fit(Small(), data, (number + 2) * EVERY, folder, keep_going, check, seen)
    check = st.CheckReplicas(every=EVERY)
    trainer = fit(Small(), data, healthy, folder, check)
    counts = {name: float(trainer.callback_metrics[f"stability/replica_{name}"]) for name in ("checks", "differences")}
    return {"trials": seen.done, "healthy": counts, "steps": healthy}


def cost(rounds: int, steps: int, folder: str) -> dict[str, Any]:
    """On two ranks: processor time of a step, of a check, and of fits with and without the plugin in turn."""
    from stabletrain.workloads import CharGPT, ShakespeareData

    def run(*plugins: Any) -> tuple[float, L.Trainer]:
        torch.manual_seed(SEED)
        stamps = Stamps()
        trainer = fit(CharGPT(sample_length=0), ShakespeareData(), steps, folder, st.SkipNonFinite(), *plugins, stamps)
        return (stamps.stamps[-1] - stamps.stamps[4]) / (steps - 5), trainer

    bare, ratios = [], []
    for each in range(rounds):  # whichever comes first has a cooler machine, so they take turns
        later = run(st.CheckReplicas(every=100))[0] if each % 2 else None
        without, _ = run()
        bare.append(without)
        ratios.append((later or run(st.CheckReplicas(every=100))[0]) / without)
    check = st.CheckReplicas(every=100)
    timed = Timed(check)
    _, trainer = run(check, timed)
    state = trainer.optimizers[0].state
    tensors = [each for p, values in state.items() for each in (p.detach(), *values.values())]
    sums = [seconds(lambda: bit_sums(tensors)) for _ in range(20)]
    hashes = [seconds(lambda: [torch.hash_tensor(each) for each in tensors]) for _ in range(20)]
    return {
        "step": statistics.median(bare),
        "ratios": ratios,
        "check": statistics.median(timed.times),
        "sums": statistics.median(sums),
        "hashes": statistics.median(hashes),
        "tensors": len(tensors),
        "elements": sum(each.numel() for each in tensors),
    }


class Timed(L.Callback):
    """Makes a check after each tenth step, besides those of the plugin, and measures its processor time."""

    def __init__(self, check: Any) -> None:
        self.check = check
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 10 == 5:
            self.times.append(seconds(lambda: self.check.check_state(now=True)))


def seconds(function: Any) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def tables(found: dict[str, Any]) -> str:
    done, healthy, each = found["trials"], found["healthy"], found["cost"]
    kinds = ["weights", "first moments", "second moments"]
    of_kind = [
        sum(" of " not in one["tensor"] for one in done),
        sum(one["tensor"].startswith("exp_avg of") for one in done),
        sum(one["tensor"].startswith("exp_avg_sq") for one in done),
    ]
    share = each["check"] / each["step"]
    lines = [
        "| three processes, DDP, AdamW | |",
        "|---|---|",
        f"| flipped bits, each in one copy ({', '.join(f'{n} in {k}' for n, k in zip(of_kind, kinds, strict=True))}) "
        f"| {len(done)} |",
        f"| found at the next check | {sum(one['found'] for one in done)} |",
        f"| process and tensor named | {sum(one['named'] for one in done)} |",
        f"| checks in {found['steps']:,} healthy steps | {healthy['checks']:.0f} |",
        f"| of them alarms | {healthy['differences']:.0f} |",
        "",
        "| char_gpt, two processes, processor time of rank 0 | |",
        "|---|---|",
        f"| tensors and elements compared | {each['tensors']}, {each['elements']:,} |",
        f"| one step, ms | {1e3 * each['step']:.1f} |",
        f"| one check, ms | {1e3 * each['check']:.2f} |",
        f"| one check over one step | {share:.3f} |",
        f"| a run with `every: 100` over one without, computed from that | {1 + share / 100:.4f} |",
        f"| with checks before each snapshot of `rollback` (`every: 25`), too | {1 + share / 25:.4f} |",
        f"| fits of {found['fit']} steps in turn, with over without, median of {len(each['ratios'])} (least to most) "
        f"| {statistics.median(each['ratios']):.3f} ({min(each['ratios']):.3f} to {max(each['ratios']):.3f}) |",
        f"| sums of bits alone, ms | {1e3 * each['sums']:.2f} |",
        f"| the same tensors by `torch.hash_tensor`, ms | {1e3 * each['hashes']:.2f} |",
    ]
    return "\n".join(lines) + "\n"


def on_ranks(size: int, options: list[str]) -> dict[str, Any]:
    """Run this script on several ranks; what rank 0 has measured."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0", "NODE_RANK": "0"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
        running = [
            subprocess.Popen(
                [sys.executable, __file__, *options, "--result", f"{folder}/{rank}.json"],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(size)
        ]
        if any(each.wait() for each in running):
            raise SystemExit("a rank has failed")
        found: dict[str, Any] = json.loads(Path(folder, "0.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40, help="flipped bits (default 40)")
    parser.add_argument("--healthy", type=int, default=2000, help="steps without a fault (default 2000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of times (default 5)")
    parser.add_argument("--steps", type=int, default=110, help="steps of a fit that is timed (default 110)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/replicas.md")
    parser.add_argument("--part", choices=("trials", "cost"), help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)  # of a rank: the file for what it has measured
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("trials", "healthy", "rounds", "steps")}
    if arguments.result:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder:
            if arguments.part == "trials":
                found = trials(arguments.trials, arguments.healthy, folder)
            else:
                found = cost(arguments.rounds, arguments.steps, folder)
        Path(arguments.result).write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may still run
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    found = on_ranks(3, [*options, "--part", "trials"])
    found["fit"] = arguments.steps
    found["cost"] = on_ranks(2, [*options, "--part", "cost"])
    text = tables(found)
    print(text)
    if arguments.write:
        command = "python benchmarks/replicas.py " + " ".join([*options, "--write"])
        head = f"# check_replicas\n\n{measured()}; gloo, the machine was shared.\n\n    {command}\n\n"
        (Path(__file__).parent / "results" / "replicas.md").write_text(head + text)


if __name__ == "__main__":
    main()
