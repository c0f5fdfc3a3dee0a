"""Kills a random one of two ranks while they save: ``python kill_ranks.py FOLDER KILLS``; prints counts.

The model is divided with FSDP2, and each step adds 1 to every weight, so that a checkpoint of parts of several steps
would be seen. Each fit resumes from the newest checkpoint of those before it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import fits
import rank_pool
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from stabletrain import SaveCheckpoints
from stabletrain.runtime.checkpoints import Store, load, verify

ROWS = 150_001


class Counting(LightningModule):
    """Each step adds 1 to every weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, ROWS, bias=False)
        nn.init.zeros_(self.net.weight)

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.net(torch.ones(2)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1.0)


class Acknowledge(Callback):
    """Writes each step whose checkpoint is on the disk to a file."""

    def __init__(self, saver: SaveCheckpoints, file: Path) -> None:
        self.saver, self.file = saver, file

    def on_train_batch_start(self, *args: Any) -> None:
        self.saver.wait()
        found = self.saver.last
        if found is not None:
            with self.file.open("a") as file:
                file.write(f"{int(Path(found).name.split('-')[1])}\n")


def train(folder: Path, checkpoints: Path, acknowledged: Path) -> None:
    """Save at every step until this process is killed."""
    saver = SaveCheckpoints(checkpoints, every=1)
    callbacks: list[Callback] = [saver]
    if os.environ["RANK"] == "0":
        callbacks.append(Acknowledge(saver, acknowledged))
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    mine = fits.trainer(*callbacks, strategy=strategy, devices=2, default_root_dir=folder, max_epochs=-1)
    fits.run(mine, Counting(), DataLoader(torch.zeros(100_000, 1)), ckpt_path=saver.last)


def _lines(file: Path) -> int:
    return len(file.read_text().split()) if file.exists() else 0


def main(folder: Path, kills: int) -> dict[str, int]:
    """Kill, and check what is on the disk, again and again; the counts."""
    generator = random.Random(0)
    checkpoints, acknowledged = folder / "checkpoints", folder / "acknowledged"
    newest = torn = read = 0
    for number in range(kills):
        acknowledged.unlink(missing_ok=True)
        port = rank_pool._free_port()
        arguments = (checkpoints, acknowledged)
        ranks = [rank_pool._start(train, rank, 2, port, folder, arguments) for rank in range(2)]
        end = time.monotonic() + 60
        while _lines(acknowledged) < 2 and time.monotonic() < end and all(each.is_alive() for each in ranks):
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.3))
        assert all(each.is_alive() for each in ranks), (folder / "rank0.log").read_text()
        victim = ranks[generator.randrange(2)]
        os.kill(victim.pid or 0, signal.SIGKILL)
        time.sleep(generator.choice([0.0, 0.3]))  # the other one may give the checkpoint up, or not come to it
        for each in ranks:
            each.kill()
            each.join()
        torn += sum(name.startswith(".writing") for name in os.listdir(checkpoints))
        known = max(int(line) for line in acknowledged.read_text().split())
        for entry in Store(checkpoints).entries():
            verify(entry.path)
            read += 1
        found = load(checkpoints)
        step = found["global_step"]
        assert step >= known >= newest, (step, known, newest)
        assert found["state_dict"]["net.weight"].eq(step).all()
        assert len(found["state_dict"]["net.weight"]) == ROWS
        newest = step
        print(f"{number + 1} of {kills}: step {step}", file=sys.stderr, flush=True)
    return {"kills": kills, "torn": torn, "read": read, "lost": 0, "newest": newest}


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
