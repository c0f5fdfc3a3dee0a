"""The manifest of a checkpoint: what it holds, the checksum of every file, and of itself."""

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
    """A checkpoint that cannot be written as it is, or cannot be read."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Args:
        step: applied optimizer steps.
        run: identity of the run; a resumed run keeps it.
        epoch: passes over the training data that were complete.
        world_size: processes that trained together.
        recipe: hash of the recipe, if it is known.
        metric: name of the monitored metric that it was saved for.
        value: that metric's value.
        whole: made between two optimizer steps. One made within an accumulation window, by a validation there, lacks
            the gradients of the window: a run cannot go on from it exactly.
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
        sequence: counts the checkpoints of a folder in the order of writing. After a rollback the newest checkpoint
            is not the one with the highest step.
        about: what the checkpoint says of itself.
        files: name -> size and checksum.
        versions: of the software that wrote it.
    """

    sequence: int
    about: CheckpointInfo
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's folder, durably."""
        content = {
            "format": FORMAT,
            "sequence": self.sequence,
            **asdict(self.about),
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
            raise CheckpointError(f"{NAME} does not have the checksum it was written with")
        if content["format"] != FORMAT:
            raise CheckpointError(f"format {content['format']}, and this version reads {FORMAT}: update stabletrain")
        return cls(
            sequence=content["sequence"],
            about=CheckpointInfo(
                **{field: content[field] for field in CheckpointInfo.__dataclass_fields__ if field in content}
            ),
            files={name: FileRecord(**record) for name, record in content["files"].items()},
            versions=content["versions"],
        )


def _signed(content: Mapping[str, Any]) -> bytes:
    """The one text that a content is written as; its checksum is over the text without it."""
    checksum = xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "checksum": checksum}, indent=1) + "\n").encode()
