"""Kills child processes at random moments while they save: ``python kill_children.py FOLDER KILLS``; prints counts.

The children are forked from one process, because importing torch takes longer than all the rest.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from stabletrain.runtime.checkpoints import CheckpointInfo, Retention, Saver, Store, load, verify

SIZE = 300_000


def save_repeatedly(folder: Path, first: int, acknowledge: int) -> None:
    """Save one checkpoint after the other, and write each step that is on the disk to a pipe."""
    saver = Saver(Store(folder, Retention(last=2)))
    saver.begin("a")
    step = first
    while True:
        weights = torch.full((SIZE,), float(step))
        saver.save({"step": step, "weights": weights}, CheckpointInfo(step=step, run="a"))
        weights.zero_()
        saver.wait()
        os.write(acknowledge, step.to_bytes(8, "little"))
        step += 1


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    generator = random.Random(0)
    acknowledged = torn = saves = 0
    killed = 0
    while killed < kills or (saves < kills and killed < 4 * kills):  # on a slow disk, kills come before saves
        killed += 1
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            save_repeatedly(folder, acknowledged + 1, writer)
        os.close(writer)
        time.sleep(generator.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            steps = pipe.read()
        saves += len(steps) // 8
        acknowledged = max(acknowledged, int.from_bytes(steps[-8:], "little"))
        if not folder.exists() or not acknowledged:
            continue
        torn += sum(name.startswith(".") for name in os.listdir(folder))
        for entry in Store(folder).entries():
            verify(entry.path)
        found = load(folder)
        assert found["step"] >= acknowledged, (found["step"], acknowledged)
        assert found["weights"].eq(found["step"]).all()
        acknowledged = found["step"]  # complete, though the child was killed before it acknowledged
    print(json.dumps({"kills": killed, "saves": saves, "torn": torn, "lost": 0, "newest": acknowledged}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
