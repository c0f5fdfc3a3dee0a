"""Read checkpoints and verify them in the same pass; instead of a damaged one, the previous good one is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from stabletrain.runtime.checkpoints import pieces
from stabletrain.runtime.checkpoints.decoding import Objects, decode, tensor_kinds
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.fields import parse, shown
from stabletrain.runtime.checkpoints.manifest import STATE, Manifest
from stabletrain.runtime.checkpoints.optimizer_keys import by_number, is_by_name
from stabletrain.runtime.checkpoints.placing import Place
from stabletrain.runtime.checkpoints.regular_file import read_regular
from stabletrain.runtime.checkpoints.store import (
    PREFIX,
    STATE_LIMIT,
    Entry,
    Store,
    checkpoint_folders,
    is_checkpoint,
)
from stabletrain.runtime.records import run_files

logger = logging.getLogger("stabletrain")

Shared = TypeVar("Shared")


class Loaded(NamedTuple):
    """A checkpoint that was read.

    Args:
        checkpoint: its content, tensors on the CPU.
        path: its folder.
        manifest: its manifest.
    """

    checkpoint: dict[str, Any]
    path: Path
    manifest: Manifest


class Alone:
    """A process that reads a checkpoint without others; with others, `lightning_io` agrees with them."""

    is_first = True
    """Whether this is rank 0, which logs."""

    def share(self, value: Shared) -> Shared:
        """What rank 0 gave."""
        return value

    def first_problem(self, problem: str) -> str:
        """The problem of the first rank that has one; empty if none has."""
        return problem


ALONE = Alone()


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that `SaveCheckpoints` wrote, verified, as data: nothing in it can run code.

    Args:
        path: a checkpoint (``.../step-00000100``); or a folder of checkpoints, a run's folder or ``.../last``, for the
            newest good one. Instead of a damaged one the previous good one of the run is read, with a warning.

    Returns:
        What was saved, as for ``torch.load``; tensors on the CPU.

    Raises:
        CheckpointError: if there is no good one; the message names the damage of each.
    """
    return load_good(path).checkpoint


def load_good(
    path: str | Path,
    check: Callable[[dict[str, Any]], object] | None = None,
    objects: Objects | None = None,
    place: Place | None = None,
    ranks: Alone = ALONE,
) -> Loaded:
    """As `load`, with the path and the manifest of the checkpoint that was read.

    With several processes all read the same one: the first that none of them finds damaged.

    Args:
        path: as for `load`.
        check: raises a `CheckpointError` for a content that is not that of a run; the previous one is then tried.
        objects: as for `decode`.
        place: as for `read`.
        ranks: the processes that read it together.
    """
    problems: list[str] = []
    candidates, unreadable = ranks.share(_listed(Path(path)) if ranks.is_first else ([], ""))
    if unreadable:
        raise CheckpointError(unreadable)
    for candidate in candidates:
        found, problem = _tried(candidate, check, objects, place, ranks)
        if problem or found is None:
            problems.append(f"{candidate.name} is damaged: {problem}")
            continue
        if problems and ranks.is_first:
            logger.warning(
                "checkpoints: %s; reading %s (step %d) instead",
                "; ".join(problems),
                found.path,
                found.manifest.info.step,
            )
        return found
    if problems:
        raise CheckpointError(f"checkpoints: none in {path} can be read: {'; '.join(problems)}")
    raise CheckpointError(f"checkpoints: there is none in {path}; expected a checkpoint, or a folder of checkpoints")


def load_own(
    path: Path,
    check: Callable[[dict[str, Any]], object] | None = None,
    objects: Objects | None = None,
    place: Place | None = None,
    ranks: Alone = ALONE,
) -> Loaded:
    """Read a checkpoint of which each process has its own part at its own path, and no other one instead.

    Args:
        path: of this process's part.
        check: as for `load_good`.
        objects: as for `decode`.
        place: as for `read`.
        ranks: the processes that read theirs.

    Raises:
        CheckpointError: on all of them, if one is damaged.
    """
    found, problem = _tried(path, check, objects, place, ranks)
    if problem or found is None:
        raise CheckpointError(f"checkpoints: the copy {path} cannot be read: {problem}")
    return found


def is_own(path: str | Path) -> bool:
    """Whether a path is a copy in a node's memory, of which each process has its own part at its own path."""
    try:
        return is_checkpoint(Path(path)) and Manifest.read(Path(path).resolve()).info.copy is not None
    except CheckpointError:
        return False


def _tried(
    path: Path,
    check: Callable[[dict[str, Any]], object] | None,
    objects: Objects | None,
    place: Place | None,
    ranks: Alone,
) -> tuple[Loaded | None, str]:
    """A checkpoint, or the first problem that a process has with it."""
    found, problem = None, ""
    try:
        found = read(path, objects, place)
        if check is not None:
            check(found.checkpoint)
    except CheckpointError as error:
        problem = str(error)
    return found, ranks.first_problem(problem)


def read(path: Path, objects: Objects | None = None, place: Place | None = None) -> Loaded:
    """Read one checkpoint, without falling back to another. Only regular files in its folder are opened.

    Args:
        path: its folder, not a link to it.
        objects: as for `decode`.
        place: the parts that this process needs of the model's tensors, and what is made of them; None: all are read
            whole, and optimizer states are by number.

    Raises:
        CheckpointError: if it is damaged; the message names the damage.
    """
    manifest = Manifest.read(path)
    problem = manifest.missing(path)
    if problem:
        raise CheckpointError(problem)
    raw = read_regular(path / STATE, STATE_LIMIT)
    if xxhash.xxh3_128(raw).hexdigest() != manifest.files[STATE].xxh3_128:
        raise CheckpointError(f"{STATE} does not match its checksum")
    state = parse(raw, STATE)
    del raw
    if not isinstance(state, dict) or not {"tree", "tensors"} <= state.keys():
        raise CheckpointError(f"{STATE}: expected an object with the entries tree and tensors")
    kinds = tensor_kinds(state["tensors"])
    targets = {} if place is None else place(state["tree"], kinds)
    files = pieces.files_of(state.get("files"), kinds, manifest)
    tensors = pieces.read(path, manifest, kinds, files, {i: each.region for i, each in targets.items()})
    for i, target in targets.items():
        tensors[i] = target.build(tensors[i])
    checkpoint = decode(state["tree"], tensors, objects)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{STATE}: expected a dict, got {shown(checkpoint)}")
    if place is None:
        _number_optimizers(checkpoint)
    return Loaded(checkpoint, path, manifest)


def verify(path: str | Path) -> Manifest:
    """Read every byte of a checkpoint and compare it with its manifest.

    Raises:
        CheckpointError: if it is damaged; the message names the damage.
    """
    return read(Path(path).resolve()).manifest


def newest(path: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder of checkpoints or a run's folder; its content is not verified.

    One that was made within an accumulation window is returned only if there is no other.

    Args:
        path: the folder; may be missing.
    """
    found = newest_entry(path)
    return None if found is None else found.path


def newest_entry(path: str | Path) -> Entry | None:
    """As `newest`, with the manifest.

    Args:
        path: the folder; may be missing.
    """
    folder = store_of(Path(path))
    entries = _best_first(Store(folder).entries() if folder else [])
    return next((entry for entry in entries if entry.manifest.missing(entry.path) is None), None)


def store_of(path: Path) -> Path | None:
    """The folder of checkpoints at a path: itself, that of a run's folder, or the parent of ``.../last``; or None."""
    if path.name == "last" and not path.exists():
        path = path.parent
    for folder in (path, path / run_files.CHECKPOINTS):
        if checkpoint_folders(folder):
            return folder
    return None


def is_ours(path: str | Path) -> bool:
    """Whether a path is a checkpoint of this format, or a folder that holds some."""
    return is_checkpoint(Path(path)) or store_of(Path(path)) is not None


def _number_optimizers(checkpoint: dict[str, Any]) -> None:
    """Optimizer states as torch loads them, so that any strategy and Lightning itself can."""
    states = checkpoint.get("optimizer_states")
    if isinstance(states, list):
        checkpoint["optimizer_states"] = [by_number(each) if is_by_name(each) else each for each in states]


def _listed(path: Path) -> tuple[list[Path], str]:
    """The checkpoints to try, and what prevents it."""
    try:
        return list(_candidates(path)), ""
    except OSError as error:
        return [], f"checkpoints: {path} cannot be read ({error.strerror})"


def _candidates(path: Path) -> Iterator[Path]:
    """The checkpoints to try, best first: none later than the requested one, and none of another run."""
    if is_checkpoint(path):
        path = path.resolve()  # the user's own link; within a folder of checkpoints links are not followed
        yield path
        entries = Store(path.parent).entries()
        own = next((entry.manifest for entry in entries if entry.path == path), None)
        if own is not None:
            entries = [e for e in entries if e.manifest.sequence < own.sequence and _same_run(e.manifest, own)]
        else:
            of_run = [entry for entry in entries if _same_run(entry.manifest, entries[-1].manifest)]
            entries = [entry for entry in of_run if entry.manifest.info.step <= _step(path)]
        yield from (entry.path for entry in _best_first(entries))
        return
    folder = store_of(path)
    if folder is None:
        return
    entries = Store(folder).entries()
    known = {entry.path for entry in entries}
    if entries:
        newest_step = entries[-1].manifest.info.step
        entries = [entry for entry in entries if _same_run(entry.manifest, entries[-1].manifest)]
    else:
        newest_step = -1
    # one without a manifest may have been the newest: reading it fails, so that the warning names it
    yield from (each for each in checkpoint_folders(folder) if each not in known and _step(each) >= newest_step)
    yield from (entry.path for entry in _best_first(entries))


def _best_first(entries: Sequence[Entry]) -> list[Entry]:
    """The newest first; those from which a run cannot resume exactly come last."""
    whole = [entry for entry in entries if entry.manifest.info.whole]
    return [*reversed(whole), *(entry for entry in reversed(entries) if not entry.manifest.info.whole)]


def _same_run(one: Manifest, other: Manifest) -> bool:
    return one.info.run == other.info.run


def _step(path: Path) -> int:
    digits = path.name.removeprefix(PREFIX).partition("-")[0]
    return int(digits) if digits.isdecimal() else 2**63
