"""Kills children at random moments while they save: ``python kill_children.py FOLDER KILLS``; prints the counts.

The children are forked from one process, since importing torch takes longer than all the rest.
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


def save_for_ever(folder: Path, first: int, said: int) -> None:
    """Save one checkpoint after the other, and say each step that is on the disk."""
    saver = Saver(Store(folder, Retention(last=2)))
    saver.begin("a")
    step = first
    while True:
        weights = torch.full((SIZE,), float(step))
        saver.save({"step": step, "weights": weights}, CheckpointInfo(step=step, run="a"))
        weights.zero_()
        saver.wait()
        os.write(said, step.to_bytes(8, "little"))
        step += 1


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    generator = random.Random(0)
    acknowledged = torn = saves = 0
    killed = 0
    while killed < kills or (saves < kills and killed < 4 * kills):  # a slow disk has saved less often by then
        killed += 1
        heard, said = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(heard)
            save_for_ever(folder, acknowledged + 1, said)
        os.close(said)
        time.sleep(generator.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(heard, "rb") as pipe:
            words = pipe.read()
        saves += len(words) // 8
        acknowledged = max(acknowledged, int.from_bytes(words[-8:], "little"))
        if not folder.exists() or not acknowledged:
            continue
        torn += sum(name.startswith(".") for name in os.listdir(folder))
        for entry in Store(folder).entries():
            verify(entry.path)
        found = load(folder)
        assert found["step"] >= acknowledged, (found["step"], acknowledged)
        assert found["weights"].eq(found["step"]).all()
        acknowledged = found["step"]  # on the disk, though the child did not come to say so
    print(json.dumps({"kills": killed, "saves": saves, "torn": torn, "lost": 0, "newest": acknowledged}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
