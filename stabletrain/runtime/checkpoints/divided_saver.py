"""Save checkpoints of which each process writes its own part; a checkpoint that one cannot write is given up by all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor

from stabletrain.runtime.checkpoints import durable, tensor_file
from stabletrain.runtime.checkpoints.collecting import parts_of
from stabletrain.runtime.checkpoints.encoding import Encoded
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.manifest import STATE, CheckpointInfo, part_file
from stabletrain.runtime.checkpoints.parts import assign
from stabletrain.runtime.checkpoints.pieces import Piece, blocks_of, index_of
from stabletrain.runtime.checkpoints.regions import whole
from stabletrain.runtime.checkpoints.regular_file import size_of
from stabletrain.runtime.checkpoints.saver import Saver
from stabletrain.runtime.checkpoints.store import Store, state_text
from stabletrain.runtime.checkpoints.writer_group import WriterGroup
from stabletrain.runtime.ranks import Ranks


class DividedSaver(Saver):
    """As `Saver`, on every process at once: making one, `prepare` and `save` are collectives.

    Args:
        store: the folder of the checkpoints, which all processes see.
        trainer: in a fit.
        background: as for `Saver`; each process copies what it writes.
        setting: as for `Saver`.
    """

    def __init__(self, store: Store, trainer: Trainer, background: bool, setting: str) -> None:
        super().__init__(store, background, setting)
        self._ranks = Ranks(trainer)
        self._group = WriterGroup()

    def close(self) -> None:
        """As for `Saver`. Call it on all ranks, when all have finished their writes: a process group is given back."""
        super().close()
        self._group.close()

    def _encode(self, checkpoint: Mapping[str, Any]) -> _OwnPart:
        self._group.open()
        problem, encoded, names = "", None, set()
        parts = {part.name: part for part in parts_of([checkpoint["state_dict"], checkpoint.get("optimizer_states")])}
        tables = self._ranks.gather({name: part.held for name, part in parts.items() if part.local is not None})
        try:
            names = assign(tables)[self._group.rank]
            encoded = Encoded(checkpoint) if self._ranks.is_first else None
        except CheckpointError as error:
            problem = str(error)
        problem = next((each for each in self._ranks.gather(problem) if each), "")
        if problem:
            raise CheckpointError(problem)
        own = _OwnPart(encoded)
        if encoded is not None:  # what is neither of the model nor of an optimizer is written by rank 0
            for i, (name, tensor) in enumerate(zip(encoded.names, encoded.tensors, strict=True)):
                if encoded.parts.get(name) != i:
                    own.add(name, whole(tensor.shape), tensor)
        for name in sorted(names):
            local = parts[name].local
            assert local is not None
            own.add(name, parts[name].region, local)
        return own

    def _put(self, info: CheckpointInfo, encoded: Any) -> Path | None:
        own: _OwnPart = encoded
        group, file = self._group, part_file(self._group.rank, self._group.size)
        folder, problem = group.share(self._begin(info.step))
        report = _written(folder / file, own) if folder is not None else _Report(problem)
        try:
            reports = group.gather(report)
            lost = [_named(rank, each.problem) for rank, each in enumerate(reports) if each.problem]
            if lost and own.encoded is not None:
                raise CheckpointError(lost[0] if folder is not None else problem)
            if own.encoded is None or folder is None:
                return None
            return self._commit(folder, info, own.encoded, reports)
        except BaseException:
            if own.encoded is not None and folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _begin(self, step: int) -> tuple[Path | None, str]:
        """The folder to write to, or why there is none; on rank 0."""
        if self._group.rank != 0:
            return None, ""
        try:
            return self.store.begin(step), ""
        except OSError as error:
            return None, _reason(error)

    def _commit(self, folder: Path, info: CheckpointInfo, encoded: Encoded, reports: list[_Report]) -> Path:
        names = [part_file(rank, len(reports)) for rank in range(len(reports))]
        files = {}
        for rank, (name, report) in enumerate(zip(names, reports, strict=True)):
            assert report.record is not None
            with contextlib.suppress(CheckpointError):
                if size_of(folder / name) == report.record.bytes:
                    files[name] = report.record
            if name not in files:
                raise CheckpointError(
                    f"rank 0 does not see the file that rank {rank} has written: use a folder that all ranks share"
                )
        blocks = index_of({name: report.pieces for name, report in zip(names, reports, strict=True)}, encoded.names)
        state = state_text(encoded.tree, encoded.names, encoded.tensors, blocks)
        files[STATE] = durable.write_file(folder / STATE, [state])
        return self.store.commit(folder, info, files)


class _Report(NamedTuple):
    """What one process has written, or why it could not."""

    problem: str = ""
    record: durable.FileRecord | None = None
    pieces: list[Piece] = []  # noqa: RUF012


class _OwnPart:
    """The blocks that one process writes; with ``encoded``, on rank 0, everything but the tensors."""

    def __init__(self, encoded: Encoded | None) -> None:
        self.encoded = encoded
        self.omitted = [] if encoded is None else encoded.omitted
        self.tensors: list[Tensor] = []
        self.pieces: list[Piece] = []

    def add(self, name: str, region: Any, local: Tensor) -> None:
        """Add a part of a tensor."""
        for piece, tensor in blocks_of(name, region, local):
            self.pieces.append(piece)
            self.tensors.append(tensor)


def _written(path: Path, own: _OwnPart) -> _Report:
    try:
        entries = [piece.entry for piece in own.pieces]
        return _Report("", durable.write_file(path, tensor_file.chunks(entries, own.tensors)), own.pieces)
    except OSError as error:
        return _Report(_reason(error))
    except Exception as error:  # whatever it is, the others wait for an answer
        return _Report(f"{type(error).__name__}: {error}")


def _named(rank: int, problem: str) -> str:
    return f"rank {rank} has not written its part: {problem}" if problem else ""


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
