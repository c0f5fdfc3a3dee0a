"""A folder of checkpoints. Each checkpoint is a folder that gets its name only when it is complete.

    checkpoints/
      step-00000100/  manifest.json  state.json  tensors.safetensors
      step-00000200/  manifest.json  state.json  tensors-00000-of-00002.safetensors  tensors-00001-of-00002.safetensors
      .writing-step-00000300-host-4711/        never read; removed when the next run starts

Order of a write: files, fsync, manifest, fsync, rename, fsync of the parent. Only then are older checkpoints deleted.
There is no pointer file that could be out of date: the newest checkpoint is the complete one that was written last.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stabletrain.core.metric_names import new_name
from stabletrain.runtime.checkpoints import durable, tensor_file
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.fields import require_few_values
from stabletrain.runtime.checkpoints.manifest import NAME as MANIFEST
from stabletrain.runtime.checkpoints.manifest import STATE, TENSORS, CheckpointInfo, Manifest
from stabletrain.version import __version__

PREFIX = "step-"
STATE_LIMIT = 256 << 20
"""Largest size of everything but the tensors, bytes."""

logger = logging.getLogger("stabletrain")

MetricMode = Literal["min", "max"]


class Entry(NamedTuple):
    """A complete checkpoint in a folder.

    Args:
        path: its folder.
        manifest: its manifest, which is undamaged; the files may not be.
    """

    path: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints of a run are not deleted.

    Args:
        last: number of the newest to retain, >= 1; None: all. Those that are not ``whole`` do not count.
        metric: the best by this metric is retained too; None: no other.
        mode: whether the smallest or the largest value is best.
    """

    last: int | None = 2
    metric: str | None = None
    mode: MetricMode = "min"


@dataclass(frozen=True)
class Store:
    """The checkpoints of one folder.

    Args:
        folder: made at the first write.
        retention: which of the run's older ones a write retains; those of other runs are never deleted.
    """

    folder: Path
    retention: Retention = field(default_factory=Retention)

    def write(self, info: CheckpointInfo, tree: Any, names: Sequence[str], tensors: Sequence[Tensor]) -> Path:
        """Write a checkpoint; when this returns, it is on the disk.

        Args:
            info: its step, run and metric.
            tree: its content as JSON values, from `Encoded`.
            names: of the tensors.
            tensors: the tensors, which must not change during the call.

        Returns:
            Its folder.

        Raises:
            OSError: if it cannot be written; older checkpoints are untouched, and the new one is removed.
            CheckpointError: if everything but the tensors is larger than `STATE_LIMIT`, or has too many values.
        """
        state = state_text(tree, names, tensors)
        folder = self.begin(info.step)
        try:
            files = {
                TENSORS: durable.write_file(folder / TENSORS, tensor_file.chunks(names, tensors)),
                STATE: durable.write_file(folder / STATE, [state]),
            }
            return self.commit(folder, info, files)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def begin(self, step: int) -> Path:
        """Make a folder for the files of a checkpoint, which counts as incomplete until `commit`.

        Args:
            step: of the checkpoint.

        Raises:
            OSError: if it cannot be made.
        """
        return durable.new_folder(self.folder, self.free_name(step))

    def commit(self, folder: Path, info: CheckpointInfo, files: Mapping[str, durable.FileRecord]) -> Path:
        """Write the manifest, give the folder its name, and delete older checkpoints.

        Args:
            folder: from `begin`; all files are in it, and synced.
            info: step, run and metric of the checkpoint.
            files: name -> size and checksum.

        Returns:
            Its folder.

        Raises:
            OSError: if it cannot be written; the folder is left as it is.
        """
        sequence = 1 + max((entry.manifest.sequence for entry in self.entries()), default=0)
        Manifest(sequence=sequence, info=info, files=files, versions=versions()).write(folder)
        final = durable.publish(folder, self.free_name(info.step))
        try:
            self._prune(info.run)
        except OSError as error:
            logger.warning("old checkpoints in %s could not be deleted: %s", self.folder, error)
        return final

    def entries(self) -> list[Entry]:
        """The complete checkpoints with an undamaged manifest, in the order of writing."""
        found = []
        for path in checkpoint_folders(self.folder):
            try:
                found.append(Entry(path, Manifest.read(path)))
            except CheckpointError:
                continue
        return sorted(found, key=lambda entry: entry.manifest.sequence)

    def sweep(self) -> None:
        """Remove the incomplete folders of killed processes."""
        durable.sweep(self.folder)

    def best(self, entries: Iterable[Entry]) -> Entry | None:
        """The best of some checkpoints by the monitored metric; of equal ones the first."""
        metric = self.retention.metric
        scored = [
            (e.manifest.info.value, e)
            for e in entries
            if metric is not None and new_name(e.manifest.info.metric or "") == new_name(metric)
        ]
        known = [(value, entry) for value, entry in scored if value is not None]
        if not known:
            return None
        choose = min if self.retention.mode == "min" else max
        return choose(known, key=lambda each: each[0])[1]

    def _prune(self, run: str) -> None:
        if self.retention.last is None:
            return
        mine = [entry for entry in self.entries() if entry.manifest.info.run == run]
        whole = [entry for entry in mine if entry.manifest.info.whole]
        retained = {entry.path for entry in (whole or mine)[-self.retention.last :]}
        best = self.best(mine)
        for entry in mine:
            if entry.path not in retained and (best is None or entry.path != best.path):
                durable.discard(entry.path)

    def free_name(self, step: int) -> str:
        """A name for the checkpoint of a step that no other one has."""
        name = f"{PREFIX}{step:08d}"
        number = 1
        while os.path.lexists(self.folder / (name if number == 1 else f"{name}-{number}")):
            number += 1
        return name if number == 1 else f"{name}-{number}"


def state_text(
    tree: Any, names: Sequence[str], tensors: Sequence[Tensor], files: Mapping[str, Any] | None = None
) -> bytes:
    """The content of the state file.

    Args:
        tree: the checkpoint as JSON values, from `Encoded`.
        names: of the tensors.
        tensors: of which only dtype and shape are read.
        files: of a checkpoint of several processes: `pieces.index_of`.

    Raises:
        CheckpointError: if it is larger than `STATE_LIMIT`, or has too many values.
    """
    index = [[each, str(t.dtype).removeprefix("torch."), list(t.shape)] for each, t in zip(names, tensors, strict=True)]
    content = {"tree": tree, "tensors": index} | ({} if files is None else {"files": files})
    state = json.dumps(content, allow_nan=False).encode()
    if len(state) > STATE_LIMIT:
        raise CheckpointError(
            f"checkpoint: everything but its tensors takes {len(state) >> 20} MB, expected at most "
            f"{STATE_LIMIT >> 20} MB: keep large lists of numbers as tensors"
        )
    require_few_values(state, "checkpoint: it")
    return state


def checkpoint_folders(folder: Path) -> list[Path]:
    """The subfolders with a checkpoint's name, sorted by name.

    Args:
        folder: may be missing.
    """
    try:
        names = sorted(each.name for each in os.scandir(folder) if each.name.startswith(PREFIX) and each.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in names]


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a folder of one checkpoint, which may be damaged."""
    return path.is_dir() and ((path / MANIFEST).exists() or path.name.startswith(PREFIX))


def versions() -> dict[str, str]:
    """The software that writes a checkpoint."""
    return {"stabletrain": __version__, "torch": torch.__version__, "python": platform.python_version()}
