"""Writes a run's copies to the nodes' memory in the background, and those of the processes whose copy it keeps."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor

from stabletrain.runtime.checkpoints import durable, tensor_file
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.manifest import STATE, CheckpointInfo, Manifest
from stabletrain.runtime.checkpoints.memory.contents import Contents, nbytes_of, of_divided, of_replicated, on_host
from stabletrain.runtime.checkpoints.memory.exchange import PART, Give, Take, first_problem, sizes_of, swap
from stabletrain.runtime.checkpoints.memory.nodes import Nodes
from stabletrain.runtime.checkpoints.memory.place import Place
from stabletrain.runtime.checkpoints.pieces import Piece, index_of
from stabletrain.runtime.checkpoints.saver import Saver
from stabletrain.runtime.checkpoints.store import Store, state_text, versions
from stabletrain.runtime.checkpoints.writer_group import WriterGroup
from stabletrain.runtime.ranks import Ranks

WHOLE = "whole"
"""Name of the part that holds everything."""
GENERATIONS = 2
"""Copies of each part that a node has room for: the newest complete one, and the one that is being written."""
_TIMEOUT = timedelta(minutes=5)
"""For the slowest process to write and to send its copy."""


def shard_name(rank: int, size: int, divided: bool) -> str:
    """Name of the part that a process needs to go on.

    Args:
        rank: of the process.
        size: number of processes.
        divided: whether the strategy divides the model among them.
    """
    return f"{rank:05d}-of-{size:05d}" if divided else WHOLE


class MemorySaver(Saver):
    """As `Saver`, on every process at once: making one, `prepare` and `save` are collectives.

    Args:
        place: of this node, locked by its first process.
        trainer: in a fit.
        nodes: of the run.
        copies: how many other nodes keep the part of each process.
        divided: whether the strategy divides the model among the processes.
        background: as for `Saver`.
    """

    def __init__(
        self, place: Place, trainer: Trainer, nodes: Nodes, copies: int, divided: bool, background: bool
    ) -> None:
        super().__init__(Store(place.node), background, "plugins.checkpoints.memory.every")
        self._place, self._trainer, self._divided, self._sequence = place, trainer, divided, 0
        self._ranks, self._group = Ranks(trainer), WriterGroup(_TIMEOUT)
        rank, size = self._group.rank, self._group.size
        self._leads, mates = nodes.leads(rank), nodes.mates(rank)
        self._writes = divided or self._leads
        self._keepers = nodes.keepers(rank, copies) if divided else []
        self._sources = nodes.sources(rank, copies) if divided else []
        self._own = shard_name(rank, size, divided)
        self._names = {each: shard_name(each, size, divided) for each in self._sources}
        kept = [each for mate in mates for each in (mate, *(nodes.sources(mate, copies) if divided else ()))]
        self._kept = {shard_name(each, size, divided) for each in kept}
        self._settled = False

    def close(self) -> None:
        """As for `Saver`. Call it on all ranks, when all have finished their writes: a process group is given back."""
        super().close()
        self._group.close()

    def bytes_needed(self, checkpoint: Mapping[str, Any]) -> tuple[int, int]:
        """Memory that this process's files take, those that it keeps for others included, and its copy. A collective.

        Args:
            checkpoint: as for `prepare`.
        """
        contents: Contents = self._encode(checkpoint)
        common = sum(each.nbytes for each in contents.tensors[: contents.common])
        text = 0 if contents.encoded is None else len(json.dumps(contents.encoded.tree))
        shared: int = self._ranks.max(common + text)
        own = nbytes_of(contents) - common + shared if self._writes else 0
        everyone = self._ranks.gather(own)
        return GENERATIONS * (own + sum(everyone[each] for each in self._sources)), nbytes_of(contents)

    def _encode(self, checkpoint: Mapping[str, Any]) -> Contents:
        self._group.open()
        is_first, contents, problem = self._ranks.is_first, Contents(None), ""
        try:
            if self._divided:
                contents = of_divided(checkpoint, is_first)
            else:
                contents = of_replicated(checkpoint, self._trainer, is_first, self._leads)
        except CheckpointError as error:
            problem = str(error)
        problem = first_problem(self._ranks.gather(problem))
        if problem:
            raise CheckpointError(problem)
        return contents

    def _put(self, info: CheckpointInfo, encoded: Any) -> Path | None:
        common = self._group.share(self._common(info, encoded))
        if isinstance(common, str):
            self._give_up(common)
            return None
        made: dict[str, Path] = {}
        try:
            problem = self._write_own(common, encoded, made)
            report = _Report(problem, sizes_of(made[self._own]) if self._own in made and not problem else [])
            reports = self._group.gather(report)
            problem = first_problem(each.problem for each in reports)
            if not problem:
                problem = first_problem(self._group.gather(self._exchange(common, reports, made)))
            if problem:
                self._give_up(problem)
                return None
            newest = {name: durable.publish(folder, self._store(name).free_name(common.info.step))
                      for name, folder in made.items()}  # fmt: skip
            made.clear()
            if self._leads:
                self._settle()
            return newest.get(self._own)
        finally:
            for folder in made.values():
                shutil.rmtree(folder, ignore_errors=True)

    def _common(self, info: CheckpointInfo, contents: Contents) -> _Common | str:
        """What all processes need of rank 0; or why there is no copy this time."""
        encoded, number = contents.encoded, contents.common
        if encoded is None:
            return ""
        try:
            text = state_text(encoded.tree, encoded.names, encoded.tensors)
        except CheckpointError as error:
            return str(error)
        # the clock, since copies of an attempt before this one may be on a node that is not here now
        self._sequence = max(self._sequence + 1, time.time_ns() // 1_000_000)
        identity = CheckpointInfo(**{**vars(info), "copy": secrets.token_hex(8)})
        pieces, tensors = contents.pieces[:number], on_host(contents.tensors[:number])
        return _Common(identity, self._sequence, text, encoded.names, pieces, tensors)

    def _give_up(self, problem: str) -> None:
        if self._ranks.is_first:
            raise CheckpointError(problem)

    def _write_own(self, common: _Common, contents: Contents, made: dict[str, Path]) -> str:
        """Write this process's part; why it could not."""
        if not self._writes:
            return ""

        def write() -> None:
            number = contents.common
            pieces = [*common.pieces, *contents.pieces[number:]]
            tensors = [*common.tensors, *contents.tensors[number:]]
            made[self._own] = folder = self._begin(self._own, common.info.step)
            entries = [piece.entry for piece in pieces]
            record = durable.write_file(folder / PART, tensor_file.chunks(entries, tensors))
            state = _with_files(common.text, index_of({PART: pieces}, common.names))
            files = {PART: record, STATE: durable.write_file(folder / STATE, [state])}
            Manifest(sequence=common.sequence, info=common.info, files=files, versions=versions()).write(folder)

        return self._tried(write)

    def _exchange(self, common: _Common, reports: list[_Report], made: dict[str, Path]) -> str:
        """Send this process's part to those that keep it, and receive theirs; what went wrong."""
        gives = [Give(keeper, made[self._own]) for keeper in self._keepers]
        takes: list[Take] = []

        def begin() -> None:
            for source, name in self._names.items():
                made[name] = self._begin(name, common.info.step)
                takes.append(Take(source, made[name], reports[source].sizes))

        problem = self._tried(begin)
        problem = first_problem(self._group.gather(problem))
        return problem or self._tried(lambda: swap(self._group, gives, takes))

    def _begin(self, name: str, step: int) -> Path:
        """A folder for a new copy; before it the older of two is deleted, so that there is room for it.

        All processes have completed the copy before this one, since each of them has begun this one.
        """
        store = self._store(name)
        for entry in store.entries()[: 1 - GENERATIONS]:
            durable.discard(entry.path)
        return store.begin(step)

    def _tried(self, job: Callable[[], str | None]) -> str:
        try:
            problem = job() or ""
        except OSError as error:
            problem = error.strerror or str(error)
        except Exception as error:  # whatever it is, the others wait for an answer
            problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        where = f"rank {self._group.rank}: " if self._group.size > 1 else ""
        return f"{where}{problem}" if problem else ""

    def _settle(self) -> None:
        """After each copy: this run lives. After the first: no older copy is needed any more."""
        with contextlib.suppress(OSError):
            self._place.touch()
            if not self._settled:
                self._place.retain(self._kept)
                self._settled = True

    def _store(self, name: str) -> Store:
        return self._place.shard(name)


class _Common(NamedTuple):
    """What all processes write into their copy.

    Args:
        info: step and identity.
        sequence: number of the copy.
        text: the state file without the list of files.
        names: of all tensors.
        pieces: of the tensors that come from rank 0.
        tensors: their elements.
    """

    info: CheckpointInfo
    sequence: int
    text: bytes
    names: list[str]
    pieces: list[Piece]
    tensors: list[Tensor]


class _Report(NamedTuple):
    """Why a process has not written its part, or the sizes of its files."""

    problem: str
    sizes: list[int]


def _with_files(text: bytes, files: Mapping[str, Any]) -> bytes:
    """The state file of one process: the text that all have, with its own list of blocks."""
    return text[:-1] + b', "files": ' + json.dumps(files).encode() + b"}"
