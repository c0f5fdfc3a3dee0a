"""The command line: a run in 32 bits that was killed continues in 8, and a new process reads torchao's state."""

import importlib.util
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")

RECIPE = (
    "train", "char_gpt", "data.batch_size=4", "model.sample_length=0", "model.layers=1",
    "+trainer.limit_val_batches=1", "plugins.checkpoints.every=5", "logger=none",
)  # fmt: skip


def end(cli, folder: str, *words: str) -> dict[str, object]:
    done = cli(*RECIPE, f"run_dir={folder}", *words, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, object] = json.loads((cli.folder / folder / "result.json").read_text())
    return result


@pytest.mark.slow
def test_a_killed_run_continues_in_8_bits_and_back(cli) -> None:
    """Bugs: the launcher or the worker refuses a checkpoint of another optimizer, although it converts; the classes of
    torchao's state are not known to a process that has not imported it; the steps are counted anew."""
    process: subprocess.Popen[str] = cli.start(*RECIPE, "run_dir=first", "optimizer=adamw", "trainer.max_steps=100000")
    saved = cli.folder / "first" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(saved.glob("step-*5/manifest.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for each in workers:
        os.kill(each, 9)
    process.communicate(timeout=120)
    steps = max(int(each.name.partition("-")[2]) for each in saved.glob("step-*") if (each / "manifest.json").exists())
    last = [steps + 10, steps + 20, steps + 30]
    assert (
        end(cli, "second", "resume=first", "optimizer=adamw_8bit", f"trainer.max_steps={last[0]}")["steps"] == last[0]
    )
    folder = "second"
    if importlib.util.find_spec("torchao") is None:
        last[2] = last[1]
    else:
        words: tuple[str, ...] = ("resume=second", "optimizer=adamw_8bit_ao", f"trainer.max_steps={last[1]}")
        assert end(cli, "third", *words)["steps"] == last[1]
        folder = "third"
    words = (f"resume={folder}", "optimizer=adamw", f"trainer.max_steps={last[2]}")
    assert end(cli, "fourth", *words)["steps"] == last[2]
