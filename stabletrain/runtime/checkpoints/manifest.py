"""The manifest of a checkpoint: its step and run, the checksum of every file, and a checksum of the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from stabletrain.errors import UserError
from stabletrain.runtime.checkpoints.durable import FileRecord, write_file

NAME = "manifest.json"
FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint holds something that cannot be stored, or cannot be read."""


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
    """

    step: int
    run: str
    epoch: int = 0
    world_size: int = 1
    recipe: str | None = None
    metric: str | None = None
    value: float | None = None
    whole: bool = True


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

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's folder, and sync it to the disk."""
        content = {
            "format": FORMAT,
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
            CheckpointError: if it is missing, damaged, or of a newer format.
        """
        try:
            raw = (folder / NAME).read_bytes()
        except FileNotFoundError:
            raise CheckpointError(f"{NAME} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{NAME} cannot be read ({error.strerror})") from None
        try:
            content = json.loads(raw)
            signed = _signed({key: value for key, value in content.items() if key != "checksum"})
        except (ValueError, AttributeError, RecursionError):
            content = signed = None
        if content is None or raw != signed:
            raise CheckpointError(f"{NAME} does not match its checksum")
        if content["format"] != FORMAT:
            raise CheckpointError(f"expected format {FORMAT}, got format {content['format']}: update stabletrain")
        return cls(
            sequence=content["sequence"],
            info=CheckpointInfo(
                **{field: content[field] for field in CheckpointInfo.__dataclass_fields__ if field in content}
            ),
            files={name: FileRecord(**record) for name, record in content["files"].items()},
            versions=content["versions"],
        )


def _signed(content: Mapping[str, Any]) -> bytes:
    """The text of a manifest, with the checksum of its content added; equal contents give equal texts."""
    checksum = xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "checksum": checksum}, indent=1) + "\n").encode()
