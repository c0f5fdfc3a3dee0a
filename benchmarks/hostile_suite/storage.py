"""Faults of the store and of the run's folder during a run."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from hostile_suite.trial import HANG, Trial, prepare, problems_of, run, running, statuses, train, trial

KIND = "faults of storage"
WORDS = ("run_dir=disk/run", "trainer.max_steps=40")

WITH_STORE = "with the store"

FAULTS = (
    ("remove:store", 12), ("remove:store", 39), ("truncate:store", 12), ("garbage:store", 12),
    ("become_folder:store", 12), ("become_pipe:store", 12), ("lock:20", 12), ("lock:600", 30),
    ("drop_tables:metrics+latest_metrics", 12), ("drop_tables:runs", 39),
    ("remove:run", 12), ("remove:run", 39), ("become_file:run", 12), ("remove:checkpoints", 12),
    ("become_file:checkpoints", 12), ("become_folder:events.jsonl", 12), ("become_folder:result.json", 39),
    ("become_folder:worker.log", 12), ("garbage:run.yaml", 12), ("cut:events.jsonl", 30),
    ("small_files:4096", 12), ("small_files:0", 39), ("few_files:2", 12), ("few_files:2", 39),
    ("fill:run", 12), ("fill:run", 39), (f"fill:run {WITH_STORE}", 12),
)  # fmt: skip
"""What the module does in the worker, and at which of the 40 steps."""
WRITES_NOTHING = "small_files:0"
"""The worker can write no byte to any file: not its last checkpoint, not its result, and not even a message to a
terminal that is a file. The launcher then says that there is no result, and the run has FAILED: what it trained since
the last checkpoint is lost."""
SMALL_DISK = 8
"""MiB of the file system that is filled."""


def trials(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Run ``count`` trainings with a fault; each must finish all of its steps, except with `WRITES_NOTHING`.

    Args:
        folder: for the runs.
        seed: not used: all faults are listed.
        count: how many of them.
    """
    for number, (does, at) in enumerate(FAULTS[:count]):
        if does.startswith("fill") and shutil.which("unshare") is None:
            continue
        yield _try(prepare(folder / str(number)), does, at)


def _try(folder: Path, does: str, at: int) -> Trial:
    (folder / "disk").mkdir()
    command = train(*WORDS, f"model.does={does.removesuffix(f' {WITH_STORE}')}", f"model.at={at}")
    if does.endswith(WITH_STORE):
        command.append(f"logger.tracking_uri=sqlite:///{folder}/disk/mlflow.db")
    if does.startswith("fill"):  # a file system of its own, which only this command sees
        disk = f"mount -t tmpfs -o size={SMALL_DISK}m tmpfs disk && exec {shlex.join(command)}"
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", disk]
    ended = run(command, folder, limit=2 * HANG)
    lost = does == WRITES_NOTHING
    problems = problems_of(ended, codes=(1 if lost else 0,))
    if lost and ("before it wrote a result" not in ended.output or statuses(folder) != ["FAILED"]):
        problems.append(f"no message that there is no result, or the status {statuses(folder)}")
    if not lost and "finished after 40 steps" not in ended.output:
        problems.append("not finished, though the training itself was not touched")
    if (loud := ended.output.count("ERROR")) > 3:
        problems.append(f"{loud} error lines on the terminal")
    if "store" not in does and "drop_tables" not in does and (left := running(folder)):
        problems.append(f"{left} stays RUNNING")
    return trial(KIND, f"{does} at step {at}", problems, ended)
