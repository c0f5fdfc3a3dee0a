"""Kill a run at every file event of its saves with ckpt-chaos, resume it, and judge by ckpt-chaos's rules.

The package ckpt-chaos counts every creation, renaming and removal of a file, and ends the process at a chosen one:
before it (`before`), with the file cut to half (`torn`), or with everything lost that was not synced to the disk
(`unsynced`). Temporary files, which Lightning renames into place, are on the same file system. ckpt-chaos's own command
starts Python twice for each point; here the processes are forked from one that has imported torch, which takes a tenth
of the time. A verdict is PASS if the run ends with the weights of an uninterrupted one, and has resumed from the newest
complete checkpoint; from an older one it is LOST_WORK.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ckpt_chaos import inject
from ckpt_chaos.byo import _newest_complete, _snapshot
from ckpt_chaos.invariants import ResumeOutcome, classify
from ckpt_chaos.runner import _events
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import ResumeExactly, SaveCheckpoints
from stabletrain.testing.trainer import quiet_trainer

STEPS, EVERY, BATCHES = 24, 8, 10
"""Length of a run, steps between saves, and batches in an epoch: runs are resumed within epochs."""
MODES = ("before", "torn", "unsynced")


class Saver(NamedTuple):
    """A way to save checkpoints and to resume from them.

    Args:
        make: makes the callback that saves to a folder; the second argument is whether to keep all.
        pattern: glob of its checkpoints in the output folder.
        resume_from: ``ckpt_path`` for a folder of checkpoints.
    """

    make: Callable[[Path, bool], Callback]
    pattern: str
    resume_from: Callable[[Path], str | None]


SAVERS = {
    "SaveCheckpoints": Saver(
        lambda folder, keep_all: SaveCheckpoints(folder=folder, every=EVERY, keep_last=None if keep_all else 2),
        "checkpoints/step-*",
        lambda folder: str(folder) if any(folder.glob("step-*")) else None,
    ),
    "ModelCheckpoint": Saver(
        lambda folder, keep_all: ModelCheckpoint(
            folder, "step={step}", every_n_train_steps=EVERY, save_top_k=-1, save_last=True,
            auto_insert_metric_name=False,
        ),
        "checkpoints/step=*.ckpt",
        lambda folder: "last",
    ),
}  # fmt: skip


class Point(NamedTuple):
    """A point at which a run was killed, and what came of it.

    Args:
        name: the file event and how the process ended.
        verdict: PASS, HARD_FAIL, SILENT_DIVERGENCE or LOST_WORK.
        problem: the exception of the resumed run; empty if there was none.
    """

    name: str
    verdict: str
    problem: str


class Model(LightningModule):
    """A small network with dropout, so that the random numbers matter too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class _StartedAt(Callback):
    step: int | None = None  # a run that was complete at its checkpoint does not start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step


def run(name: str, work: Path, modes: tuple[str, ...] = MODES) -> list[Point]:
    """Kill a run at every event in every mode, and resume it.

    Args:
        name: of one of `SAVERS`.
        work: an empty folder.
        modes: how the process ends.
    """
    saver = SAVERS[name]
    _in_child(lambda: _train(saver, work / "whole", keep_all=True))
    complete = _snapshot(saver.pattern, work / "whole")
    final = json.loads((work / "whole.json").read_text())["weights"]
    _in_child(lambda: _train(saver, work / "reference", armed={"log_path": f"{work}/events"}))
    events = _events(work / "events")
    assert json.loads((work / "reference.json").read_text())["weights"] == final, "two whole runs differ"
    points = []
    for mode in modes:
        for number, kind, file, tornable in events:
            if mode == "torn" and not tornable:
                continue
            out = work / f"{mode}-{number}"
            _in_child(
                lambda out=out, number=number, mode=mode: _train(saver, out, armed={"crash_at": number, "mode": mode})
            )
            newest = _newest_complete(complete, _snapshot(saver.pattern, out))
            _in_child(lambda out=out: _train(saver, out, resume=True))
            found = json.loads(out.with_suffix(".json").read_text())
            difference = None if found["raised"] else float(found["weights"] != final)
            verdict = classify(ResumeOutcome(found["raised"] or None, found["step"], newest, difference))
            points.append(Point(f"{number} {kind}:{file} [{mode}]", verdict, found["raised"]))
    return points


def _train(
    saver: Saver, out: Path, keep_all: bool = False, resume: bool = False, armed: dict[str, Any] | None = None
) -> None:
    """Train in a forked process, and write how it went beside the output folder."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    folder = out / "checkpoints"
    started = _StartedAt()
    found: dict[str, Any] = {"raised": "", "step": None, "weights": None}
    (out / "tmp").mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(out / "tmp")
    if armed is not None:
        inject.arm(str(out), torn_python=True, **armed)
    try:
        seed_everything(0, verbose=False)
        model = Model()
        x = torch.randn(BATCHES * 4, 8)
        data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
        trainer = quiet_trainer(
            started, ResumeExactly(), saver.make(folder, keep_all), max_steps=STEPS, max_epochs=-1, default_root_dir=out
        )
        trainer.fit(model, data, ckpt_path=saver.resume_from(folder) if resume else None)
        weights = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
        found.update(step=trainer.global_step if started.step is None else started.step, weights=weights.tolist())
    except BaseException as error:
        found["raised"] = "".join(traceback.format_exception_only(error)).strip()[:300]
    out.with_suffix(".json").write_text(json.dumps(found))


def _in_child(work: Callable[[], None]) -> None:
    """Run a function in a forked process, which ends without Python's cleanup, as a killed one does."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    os.waitpid(child, 0)


def summary(points: list[Point]) -> dict[str, int]:
    """Number of points by verdict."""
    counts: dict[str, int] = {}
    for point in points:
        counts[point.verdict] = counts.get(point.verdict, 0) + 1
    return counts


def table(results: dict[str, list[Point]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    verdicts = ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK")
    yield f"| saved by | killed at | {' | '.join(verdicts)} |"
    yield "|---" * (len(verdicts) + 2) + "|"
    for name, points in results.items():
        counts = summary(points)
        yield f"| {name} | {len(points)} | {' | '.join(str(counts.get(each, 0)) for each in verdicts)} |"
