"""The checkpoints in a run's folder, verified and as data: those of `SaveCheckpoints` and single files of Lightning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.loading import read, store_of
from stabletrain.runtime.checkpoints.newest_file import newest_files
from stabletrain.runtime.checkpoints.single_file import load_file
from stabletrain.runtime.checkpoints.store import Store
from stabletrain.runtime.records.run_files import CHECKPOINTS


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was read.

    Args:
        step: applied steps.
        name: of its file or folder.
        content: as Lightning loads it; tensors on the CPU.
    """

    step: int
    name: str
    content: Mapping[str, Any]


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, in the order in which they were written; none of them is read.

    Of verified checkpoints only those of the run that has written last, without those that a rollback has left behind;
    of links to files only the files.

    Args:
        folder: the run's folder.

    Raises:
        UserError: if it has none.
    """
    store = store_of(folder)
    entries = Store(store).entries() if store is not None else []
    verified: list[Path] = []
    before: float = math.inf
    for entry in reversed(entries):
        info = entry.manifest.info
        if info.run == entries[-1].manifest.info.run and info.step < before:
            verified.insert(0, entry.path)
            before = info.step
    files = {path.resolve(): None for path in reversed(newest_files(folder / CHECKPOINTS))}
    found = [*verified, *files]
    if not found:
        raise UserError(
            f"landscape: {folder} has no checkpoint in {CHECKPOINTS}/; expected at least one, and for the path of the "
            "training at least three: train with plugins/checkpoints=save plugins.checkpoints.every=2% "
            "plugins.checkpoints.keep_last=null"
        )
    return found


def thinned(paths: Sequence[Path], most: int) -> list[Path]:
    """Return at most so many of the paths, evenly spaced, with the first and the last one.

    Args:
        paths: in order.
        most: at least 1; 1: the last one alone.

    >>> [path.name for path in thinned([Path(str(n)) for n in range(7)], 3)]
    ['0', '3', '6']
    """
    if len(paths) <= most:
        return list(paths)
    if most == 1:
        return [paths[-1]]
    return [paths[round(index * (len(paths) - 1) / (most - 1))] for index in range(most)]


def read_checkpoints(paths: Sequence[Path], problems: list[str]) -> Iterator[Saved]:
    """Read checkpoints one after the other; nothing in them can run code.

    Args:
        paths: from `checkpoint_paths`.
        problems: gets a sentence for each one that cannot be read, which is left out.
    """
    for path in paths:
        try:
            content = _content(path)
            step = content.get("global_step")
            if not isinstance(content.get("state_dict"), Mapping):
                raise CheckpointError("it holds no weights (state_dict)")
        except CheckpointError as error:
            problems.append(f"{path.name} is left out: {error}")
            continue
        yield Saved(step=step if isinstance(step, int) else 0, name=path.name, content=content)


def _content(path: Path) -> dict[str, Any]:
    if path.is_dir() and path.suffix == ".ckpt":
        raise CheckpointError(
            "it is a folder that a sharded strategy has written; train with plugins/checkpoints=save, of which also "
            "divided checkpoints are read"
        )
    return read(path).checkpoint if path.is_dir() else load_file(path)
