"""Sends the files of a copy to processes on other nodes, in pieces, so that it takes no memory for a second copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from torch import Tensor

from stabletrain.runtime.checkpoints.durable import FileRecord
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.manifest import NAME, STATE, Manifest, part_file
from stabletrain.runtime.checkpoints.regular_file import open_regular, size_of
from stabletrain.runtime.checkpoints.writer_group import WriterGroup

PART = part_file(0, 1)
"""The file with the tensors of a copy, of which one process has written all."""
FILES = (NAME, STATE, PART)
"""The files of a copy, in the order in which they are sent."""
_PIECE = 8 << 20
"""Bytes that are sent at a time."""


class Give(NamedTuple):
    """A copy that this process sends.

    Args:
        to: rank that receives it.
        folder: of the copy.
    """

    to: int
    folder: Path


class Take(NamedTuple):
    """A copy that this process receives.

    Args:
        source: rank that sends it.
        folder: an existing empty one, for the files.
        sizes: of the files that are sent, bytes.
    """

    source: int
    folder: Path
    sizes: Sequence[int]


def sizes_of(folder: Path) -> list[int]:
    """The sizes of the files of a copy, bytes.

    Raises:
        CheckpointError: if one is missing.
    """
    return [size_of(folder / name) for name in FILES]


def first_problem(problems: Iterable[str]) -> str:
    """The first of the problems of all processes; empty if there is none."""
    return next((each for each in problems if each), "")


def swap(group: WriterGroup, gives: Sequence[Give], takes: Sequence[Take]) -> str:
    """Send and receive copies. All processes that are named as receivers or senders call it at once.

    Args:
        group: of the processes.
        gives: what this process sends, at most one copy to each rank.
        takes: what it receives, at most one copy from each rank.

    Returns:
        Why a copy could not be received whole; empty if all were. The others are not kept waiting by it.

    Raises:
        CheckpointError: if another process is lost, or a file to send cannot be read.
    """
    senders, receivers = [_Sender(each) for each in gives], [_Receiver(each) for each in takes]
    try:
        while any(each.left for each in senders) or any(each.left for each in receivers):
            work = [group.send(each.next_piece(), each.to) for each in senders if each.left]
            waiting = [(each, group.receive(each.room(), each.source)) for each in receivers if each.left]
            group.finish([*work, *(each for _, each in waiting)])
            for receiver, _ in waiting:
                receiver.write()
        return next((problem for each in receivers if (problem := each.finish())), "")
    finally:
        for sender in senders:
            sender.close()
        for receiver in receivers:
            receiver.close()


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.numpy()
    return memoryview(flat)


class _Sender:
    def __init__(self, give: Give) -> None:
        self.to = give.to
        self._folder = give.folder
        self.left = sum(sizes_of(give.folder))
        self._names = iter(FILES)
        self._file: BinaryIO | None = None

    def next_piece(self) -> Tensor:
        piece = torch.empty(min(self.left, _PIECE), dtype=torch.uint8)
        view, done = _bytes(piece), 0
        while done < len(view):
            if self._file is None:
                name = next(self._names, None)
                if name is None:
                    raise CheckpointError(f"the copy {self._folder.name} became shorter while it was sent")
                self._file = open_regular(self._folder / name)
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                self.close()
            done += count
        self.left -= len(view)
        return piece

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _Receiver:
    def __init__(self, take: Take) -> None:
        self.source = take.source
        self._folder = take.folder
        self.left = sum(take.sizes)
        self._rest = list(zip(FILES, take.sizes, strict=True))
        self._file: BinaryIO | None = None
        self._room = torch.empty(min(self.left, _PIECE), dtype=torch.uint8)
        self._piece = self._room
        self._records: dict[str, FileRecord] = {}
        self._problem = ""
        self._begin()

    def room(self) -> Tensor:
        self._piece = self._room[: min(self.left, _PIECE)]
        return self._piece

    def write(self) -> None:
        view = _bytes(self._piece)
        self.left -= len(view)
        while len(view) and self._rest:
            name, size = self._rest[0]
            part = view[: size - self._done]
            view = view[len(part) :]
            self._digest.update(part)
            self._done += len(part)
            self._put(part)
            if self._done == size:
                self._records[name] = FileRecord(size, self._digest.hexdigest())
                self._rest.pop(0)
                self.close()
                self._begin()

    def finish(self) -> str:
        """What is wrong with the copy that was received."""
        if self._problem:
            return self._problem
        try:
            expected = Manifest.read(self._folder).files
        except CheckpointError as error:
            return str(error)
        if any(expected.get(name) != self._records.get(name) for name in (STATE, PART)):
            return f"what came from rank {self.source} does not match its checksums"
        return ""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._done, self._digest = 0, xxhash.xxh3_128()
        if not self._rest or self._problem:
            return
        try:
            self._file = (self._folder / self._rest[0][0]).open("xb", buffering=0)
        except OSError as error:
            self._problem = error.strerror or str(error)

    def _put(self, part: memoryview) -> None:
        if self._problem or self._file is None:
            return
        try:
            while len(part):
                part = part[self._file.write(part) :]
        except OSError as error:
            self._problem = error.strerror or str(error)
