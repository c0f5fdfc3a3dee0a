"""Lose the memory of a node and all its processes, and compare the final state with that of an undisturbed run.

    python benchmarks/memory_copies.py            10 trials and the cost of copies; prints the tables
    python benchmarks/memory_copies.py --write    also write benchmarks/results/memory_copies.md

A trial is a script under ``torchrun --max-restarts 3``: four processes, two of which count as one node with a memory
folder of its own, FSDP2, an MLP with AdamW (19 MB of state), shuffled data and dropout, copies every 10 steps, and
checkpoints on disk every 10 minutes, so that the only one is of step 1. At a random step the folder of a random node is
deleted and its processes are killed, at the same moment; every other trial loses the other node later in the same run.
torchrun then starts all processes again. Compared with `torch.equal` on each rank: weights and optimizer state.

The cost is measured with two processes: fits without copies, with copies every 20 steps and with an automatic interval
follow each other in turns in the same processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
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
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from machine import measured
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import ClipZScore, ResumeExactly, SaveCheckpoints, SkipNonFinite

STEPS, EVERY, WIDTH = 150, 10, 384
SECOND = 40
"""Steps after the first loss at which the other node is lost, in every other trial."""


class Net(L.LightningModule):
    """An MLP of nine layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1)) for _ in range(9)]
        self.net = nn.Sequential(*layers)

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(next(self.net.parameters()), DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        return (self.net(x) - x.sin()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Watch(L.Callback):
    """Tells the driver how far the run is, and where an attempt went on."""

    def __init__(self, folder: Path, saver: SaveCheckpoints) -> None:
        self.folder, self.saver, self.began = folder, saver, time.time()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        chosen = self.saver._copies._chosen if self.saver._copies is not None else None
        took = 0.0 if chosen is None else chosen.seconds
        line = {"rank": trainer.global_rank, "pid": os.getpid(), "from": trainer.global_step, "seconds": took}
        line["received"] = [] if chosen is None else chosen.received
        with (self.folder / f"starts-{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            (self.folder / "step").write_text(str(trainer.global_step))


def _trainer(strategy: Strategy, devices: int, nodes: int, steps: int, *callbacks: L.Callback, **options: Any) -> Any:
    return L.Trainer(
        accelerator="cpu", strategy=strategy, devices=devices, num_nodes=nodes, max_steps=steps, max_epochs=-1,
        logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


def _data() -> Any:
    return DataLoader(
        TensorDataset(torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(1))), 8, shuffle=True
    )


def worker(folder: Path, memory: bool) -> None:
    """One process of a trial, under torchrun."""
    rank = int(os.environ["RANK"])
    os.environ |= {"GROUP_RANK": str(rank // 2), "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    options = {"every": EVERY if memory else None, "folder": str(folder / f"memory-{rank // 2}")}
    saver = SaveCheckpoints(folder / "checkpoints", every="10min", memory=options)
    L.seed_everything(0, verbose=False)
    mine = _trainer(
        ModelParallelStrategy(4, 1, process_group_backend="gloo"), 2, 2, STEPS,
        ResumeExactly(), ClipZScore(), SkipNonFinite(), saver, Watch(folder, saver), default_root_dir=folder,
    )  # fmt: skip
    module = Net()
    mine.fit(module, _data())
    found = [p.to_local() for p in module.parameters()]
    for state in (mine.optimizers[0].state[p] for p in module.parameters()):
        found += [each.to_local() if isinstance(each, DTensor) else each for _, each in sorted(state.items())]
    torch.save([each.detach().clone() for each in found], folder / f"end-{rank}.pt")
    _leave()


def cost(folder: Path) -> None:
    """Steps without copies, with one every 20 steps, and with an automatic interval, in turns, under torchrun."""
    seconds: dict[str, list[float]] = {"none": [], "20": [], "auto": []}
    for turn in range(12):
        for name in sorted(seconds, key=lambda each, turn=turn: (each + "abc"[turn % 3])[::-1]):
            every = {"none": None, "20": 20, "auto": "auto"}[name]
            saver = SaveCheckpoints(
                folder / f"{turn}-{name}", every=None, memory={"every": every, "folder": str(folder / "memory")}
            )
            clock = _Clock()
            strategy = DDPStrategy(process_group_backend="gloo")
            mine = _trainer(strategy, 2, 1, 140, saver, clock, default_root_dir=folder)
            mine.fit(Net(), _data())
            seconds[name].append(clock.seconds)
    if dist.get_rank() == 0:
        (folder / "cost.json").write_text(json.dumps(seconds))
    _leave()


class _Clock(L.Callback):
    seconds = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in (20, 120):
            self.seconds = time.monotonic() - self.seconds


def _leave() -> None:
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still run, and would abort the process at the interpreter's end


def torchrun(folder: Path, processes: int, *arguments: str) -> subprocess.Popen[bytes]:
    """Start this script under torchrun."""
    log = (folder / "log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         "--max-restarts=3", __file__, "--worker", str(folder), *arguments],
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, stdout=log, stderr=log,
    )  # fmt: skip


def _starts(folder: Path, rank: int) -> list[dict[str, Any]]:
    file = folder / f"starts-{rank}"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _step(folder: Path) -> int:
    try:
        return int((folder / "step").read_text() or 0)
    except (OSError, ValueError):
        return 0


def trial(folder: Path, losses: list[tuple[int, int]], limit: float = 900.0) -> dict[str, Any]:
    """Run once.

    Args:
        folder: an existing one.
        losses: at which steps which node is lost.
        limit: seconds for the whole trial.
    """
    run, lost, end = torchrun(folder, 4), [], time.monotonic() + limit
    try:
        for number, (at, node) in enumerate(losses):
            while _step(folder) < at or len(_starts(folder, 0)) < number + 1:
                if run.poll() is not None or time.monotonic() > end:
                    return {"problem": f"ended with {run.poll()} before the loss at step {at}"}
                time.sleep(0.005)
            pids = [_starts(folder, rank)[-1]["pid"] for rank in (2 * node, 2 * node + 1)]
            shutil.rmtree(folder / f"memory-{node}", ignore_errors=True)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(folder / f"memory-{node}", ignore_errors=True)
            lost.append(_step(folder))
        code = run.wait(max(1.0, end - time.monotonic()))
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"problem": str(error)}
    finally:
        run.terminate()
        try:
            run.wait(40)
        except subprocess.TimeoutExpired:
            run.kill()
    starts = _starts(folder, 0)[1:]
    if code != 0 or len(starts) != len(lost):
        return {"problem": f"exit code {code}, {len(starts)} restarts"}
    return {
        "lost at": lost, "went on from": [each["from"] for each in starts],
        "seconds": [each["seconds"] for each in starts], "received": [each["received"] for each in starts],
    }  # fmt: skip


def same(one: Path, other: Path) -> bool:
    """Whether the final states of two runs are equal, bit for bit, on each rank."""
    for rank in range(4):
        mine, theirs = (torch.load(each / f"end-{rank}.pt", weights_only=True) for each in (one, other))
        if len(mine) != len(theirs) or not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            return False
    return True


def main() -> int:
    """Run the trials and the measurement; the exit code is 1 if a trial's end is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="for the steps and nodes of the losses")
    parser.add_argument("--folder", type=Path, help="for the runs, on a memory file system; default: /dev/shm")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/memory_copies.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cost", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if arguments.worker is not None:
        cost(arguments.worker) if arguments.cost else worker(arguments.worker, not arguments.without)
    generator, rows, problems = random.Random(arguments.seed), [], 0
    with tempfile.TemporaryDirectory(dir=arguments.folder or "/dev/shm") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        if torchrun(whole, 4, "--without").wait(300) != 0:
            print((whole / "log").read_text()[-3000:])
            return 1
        for number in range(arguments.trials):
            folder = Path(scratch) / f"trial-{number}"
            folder.mkdir()
            at, node = generator.randrange(2 * EVERY + 1, STEPS - SECOND - EVERY), generator.randrange(2)
            losses = [(at, node), *([(at + SECOND, 1 - node)] if number % 2 else [])]
            found = trial(folder, losses)
            if "problem" in found:
                print((folder / "log").read_text()[-3000:])
                row, good = [str(losses), found["problem"], "", "", "no"], False
            else:
                good = same(folder, whole)
                steps = [a - b for a, b in zip(found["lost at"], found["went on from"], strict=True)]
                events = zip(found["lost at"], losses, strict=True)
                row = [
                    " and ".join(f"node {each} at {step}" for step, (_, each) in events),
                    ", ".join(map(str, found["went on from"])),
                    ", ".join(map(str, steps)),
                    ", ".join(f"{each:.2f}" for each in found["seconds"]),
                    "yes" if good else "no",
                ]  # fmt: skip
            problems += not good
            rows.append(f"| {' | '.join(row)} |")
            print(rows[-1], flush=True)
            if good:
                shutil.rmtree(folder)
        lines = [
            "| lost | went on from step | steps lost | seconds until every part was there | identical at the end |",
            "|---|---|---|---|---|",
            *rows, "", f"{arguments.trials - problems} of {arguments.trials} identical.", "", *_cost(Path(scratch)),
        ]  # fmt: skip
    print("\n".join(lines))
    if arguments.write:
        (Path(__file__).parent / "results" / "memory_copies.md").write_text(
            f"# Copies in the nodes' memory\n\n`python benchmarks/memory_copies.py --write`. {measured()}.\nThe "
            "docstring of the script describes a trial.\n\n" + "\n".join(lines) + "\n"
        )
    return 1 if problems else 0


def _cost(scratch: Path) -> list[str]:
    folder = scratch / "cost"
    folder.mkdir()
    if torchrun(folder, 2, "--cost").wait(600) != 0:
        return ["The cost was not measured.", (folder / "log").read_text()[-1000:]]
    seconds = json.loads((folder / "cost.json").read_text())
    ratios = {
        name: sorted(a / b for a, b in zip(seconds[name], seconds["none"], strict=True)) for name in ("20", "auto")
    }
    lines = ["| copies | time of a step, of that without copies: median of 12 pairs | quartiles |", "|---|---|---|"]
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        lines.append(f"| every: {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    step = statistics.median(seconds["none"]) / 100
    return [*lines, "", f"A step takes {1e3 * step:.0f} ms (two processes, DDP, gloo; 19 MB of state on the node)."]


if __name__ == "__main__":
    sys.exit(main())
