"""The manifest of a checkpoint: its step and run, the checksum of every file, and a checksum of the manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from stabletrain.runtime.checkpoints.durable import FileRecord, write_file
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.fields import Fields, parse
from stabletrain.runtime.checkpoints.regular_file import read_regular, size_of

NAME = "manifest.json"
STATE = "state.json"
TENSORS = "tensors.safetensors"
FORMAT = 1
"""Of checkpoints that one process writes: all tensors are in `TENSORS`."""
DIVIDED_FORMAT = 2
"""Of checkpoints that several processes write, each its own file: `part_file`."""
_LIMIT = 16 << 20
"""Largest size, bytes; a manifest has about 700, and 120 more for each file."""
TRAINED_LIMIT = 2000
"""Longest text of `CheckpointInfo.trained`."""
_CHECKSUM = re.compile("[0-9a-f]{32}")


def part_file(rank: int, size: int) -> str:
    """Name of the file that one of several processes writes.

    >>> part_file(0, 2)
    'tensors-00000-of-00002.safetensors'
    """
    return f"tensors-{rank:05d}-of-{size:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Step, run and metric of a checkpoint.

    Args:
        step: applied optimizer steps.
        run: identity of the run; a resumed run has the same.
        epoch: complete passes over the training data.
        world_size: number of processes.
        recipe: hash of the recipe; None: unknown.
        metric: name of the monitored metric that it was saved for; None: it was saved for another reason.
        value: that metric's value.
        whole: made between two optimizer steps. A checkpoint that a validation makes within an accumulation window
            lacks the gradients of the window: a run cannot resume from it exactly.
        saves: checkpoints on disk that the run has begun to save so far, this one included; 0: not counted.
        copy: of a copy in the nodes' memory, the identity that the parts of all processes share; None on disk.
        trained: what was trained, from `what_is_trained.describe`; empty: unknown.
    """

    step: int
    run: str
    epoch: int = 0
    world_size: int = 1
    recipe: str | None = None
    metric: str | None = None
    value: float | None = None
    whole: bool = True
    saves: int = 0
    copy: str | None = None
    trained: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest.

    Args:
        sequence: number of the checkpoint in its folder, in the order of writing. After a rollback the newest
            checkpoint is not the one with the highest step.
        info: step, run and metric of the checkpoint.
        files: name -> size and checksum.
        versions: of the software that wrote it.
    """

    sequence: int
    info: CheckpointInfo
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]

    @property
    def is_divided(self) -> bool:
        """Whether each of several processes has written a file of its own."""
        return TENSORS not in self.files

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's folder, and sync it to the disk."""
        content = {
            "format": DIVIDED_FORMAT if self.is_divided else FORMAT,
            "sequence": self.sequence,
            **asdict(self.info),
            "versions": dict(self.versions),
            "files": {name: record._asdict() for name, record in self.files.items()},
        }
        write_file(folder / NAME, [_signed(content)])

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a checkpoint's folder.

        Raises:
            CheckpointError: if it is missing, damaged, of a newer format, or a field has another type or range. The
                folder itself may not be a symbolic link either.
        """
        if folder.is_symlink():
            raise CheckpointError(f"{folder.name} is a symbolic link; use the path of its target")
        raw = read_regular(folder / NAME, _LIMIT)
        try:
            content = parse(raw, NAME)
            signed = _signed({key: value for key, value in content.items() if key != "checksum"})
        except (CheckpointError, AttributeError, ValueError, RecursionError):
            signed = None
        if raw != signed:
            raise CheckpointError(f"{NAME} does not match its checksum")
        fields = Fields(content, NAME)
        found = fields.integer("format")
        if found not in (FORMAT, DIVIDED_FORMAT):
            raise CheckpointError(
                f"expected format {FORMAT} or {DIVIDED_FORMAT}, got format {found}: update stabletrain"
            )
        versions, trained = fields.nested("versions"), fields.nested("trained", optional=True)
        return cls(
            sequence=fields.integer("sequence"),
            info=CheckpointInfo(
                step=fields.integer("step"),
                run=fields.text("run"),
                epoch=fields.integer("epoch", default=0),
                world_size=fields.integer("world_size", low=1, default=1),
                recipe=fields.text("recipe", optional=True),
                metric=fields.text("metric", optional=True),
                value=fields.number("value"),
                whole=fields.boolean("whole", default=True),
                saves=fields.integer("saves", default=0),
                copy=fields.text("copy", optional=True),
                trained={name: trained.text(name, limit=TRAINED_LIMIT) for name in trained.items(limit=1000)},
            ),
            files=_records(fields.nested("files"), found == DIVIDED_FORMAT),
            versions={name: versions.text(name) for name in versions.items(limit=100)},
        )

    def missing(self, folder: Path) -> str | None:
        """A file that is missing, not a regular one, or of another size, as a message; None if there is none."""
        for name, record in self.files.items():
            try:
                size = size_of(folder / name)
            except CheckpointError as error:
                return str(error)
            if size != record.bytes:
                return f"{name} has {size} bytes, expected {record.bytes}"
        return None


def _records(files: Fields, is_divided: bool) -> dict[str, FileRecord]:
    """Size and checksum of the files of a checkpoint: `STATE`, and one with tensors or one for each process."""
    names = files.items(limit=100_000)
    if is_divided:
        expected = {part_file(rank, len(names) - 1) for rank in range(len(names) - 1)}
        if not expected or set(names) != {STATE, *expected}:
            raise CheckpointError(f"{NAME}: expected the file {STATE} and one of tensors for each process, got others")
    elif set(names) != {STATE, TENSORS}:
        raise CheckpointError(f"{NAME}: expected the files {STATE} and {TENSORS}, got others")
    records = {}
    for name in names:
        record = files.nested(name)
        checksum = record.text("xxh3_128")
        if not _CHECKSUM.fullmatch(checksum):
            raise CheckpointError(f"{NAME}: the checksum of {name} must be 32 hexadecimal digits")
        records[name] = FileRecord(record.integer("bytes"), checksum)
    return records


def _signed(content: Mapping[str, Any]) -> bytes:
    """The text of a manifest, with the checksum of its content added; equal contents give equal texts."""
    checksum = xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "checksum": checksum}, indent=1) + "\n").encode()
