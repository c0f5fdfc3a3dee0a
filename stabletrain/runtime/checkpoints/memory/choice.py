"""The copies in memory that a restarted run goes on from: the newest of which every process finds its part, verified.

A part is looked for on the own node first, then on the others. A damaged one is as good as none. The parts of one copy
share an identity, so that parts of two copies of the same step are never combined: they may be of two attempts.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Trainer

from stabletrain.runtime.checkpoints import durable
from stabletrain.runtime.checkpoints.manifest import CheckpointInfo, Manifest
from stabletrain.runtime.checkpoints.memory.exchange import FILES, Give, Take, first_problem, sizes_of, swap
from stabletrain.runtime.checkpoints.memory.nodes import Nodes
from stabletrain.runtime.checkpoints.memory.place import Place
from stabletrain.runtime.checkpoints.memory.verifying import problem_of
from stabletrain.runtime.checkpoints.writer_group import WriterGroup
from stabletrain.runtime.ranks import Ranks

logger = logging.getLogger("stabletrain")


class Copy(NamedTuple):
    """A copy that a process sees on its machine.

    Args:
        name: of the part.
        path: its folder.
        sequence: in the order of writing.
        info: of its manifest.
    """

    name: str
    path: Path
    sequence: int
    info: CheckpointInfo


class Chosen(NamedTuple):
    """What a run goes on from.

    Args:
        path: this process's part, on its own machine.
        info: of its manifest.
        received: ranks whose part came from another node.
        seconds: that it took to verify the parts, and to receive those.
    """

    path: Path
    info: CheckpointInfo
    received: list[int]
    seconds: float


class Choice:
    """Finds the copies of a run on all nodes. Making one is a collective.

    Args:
        trainer: whose strategy has set up its environment.
        place: of this node.
        nodes: of the run.
        name: of the part that this process needs.
    """

    def __init__(self, trainer: Trainer, place: Place, nodes: Nodes, name: str) -> None:
        self._ranks, self._place, self._nodes = Ranks(trainer), place, nodes
        self._rank = trainer.global_rank
        self._problems: list[str] = []
        mine = [
            Copy(name, entry.path, entry.manifest.sequence, entry.manifest.info)
            for name, entry in place.entries()
            if entry.manifest.info.copy is not None and entry.manifest.missing(entry.path) is None
        ]
        everyone = self._ranks.gather((name, mine))
        self._wanted = [each for each, _ in everyone]
        self._seen = [copies for _, copies in everyone]

    def newest(self, accepts: Callable[[CheckpointInfo], bool]) -> Chosen | None:
        """The newest copy that is whole, or None; the same one on all ranks. A collective.

        Args:
            accepts: whether a copy is one of this run, and not older than its checkpoint on disk; the same on all
                ranks.
        """
        began, group = time.monotonic(), WriterGroup()
        try:
            for identity in self._candidates(accepts):
                found = self._whole(identity, group)
                if found is not None:
                    path, received = found
                    info = Manifest.read(path).info
                    return Chosen(path, info, received, time.monotonic() - began)
        finally:
            group.close()
            problems = [each for some in self._ranks.gather(self._problems) for each in some]
            if problems and self._ranks.is_first:
                logger.warning("checkpoints: damaged copies in memory are not used: %s", "; ".join(problems))
        return None

    def _candidates(self, accepts: Callable[[CheckpointInfo], bool]) -> Iterable[str]:
        """The identities of the copies of which each part is somewhere, the newest first."""
        known: dict[str, tuple[int, set[str]]] = {}
        for copies in self._seen:
            for each in copies:
                if each.info.copy is not None and accepts(each.info):
                    known.setdefault(each.info.copy, (each.sequence, set()))[1].add(each.name)
        wanted = set(self._wanted)
        found = [(sequence, identity) for identity, (sequence, names) in known.items() if wanted <= names]
        return [identity for _, identity in sorted(found, reverse=True)]

    def _whole(self, identity: str, group: WriterGroup) -> tuple[Path, list[int]] | None:
        """This process's part of one copy, and who received theirs from another node; None if a part is lost."""
        own = self._verified(self._wanted[self._rank], identity)
        lacking = [rank for rank, has in enumerate(self._ranks.gather(own is not None)) if not has]
        if not lacking:
            return (own, []) if own is not None else None
        receivers = {(self._nodes.members[r].node, self._wanted[r]): r for r in reversed(lacking)}
        needed = {name for _, name in receivers}
        offers = {name: path for name in needed if (path := self._verified(name, identity)) is not None}
        everyone = self._ranks.gather({name: sizes_of(path) for name, path in offers.items()})
        givers = {name: r for r, each in reversed(list(enumerate(everyone))) for name in each}
        if len(givers) < len(needed):
            return None
        folders = self._fetched(identity, receivers, givers, offers, everyone, group)
        if folders is None:
            return None
        if own is None:
            own = folders[self._nodes.members[self._rank].node, self._wanted[self._rank]]
        return own, lacking

    def _fetched(
        self,
        identity: str,
        receivers: Mapping[tuple[int, str], int],
        givers: Mapping[str, int],
        offers: Mapping[str, Path],
        sizes: Sequence[Mapping[str, Sequence[int]]],
        group: WriterGroup,
    ) -> dict[tuple[int, str], Path] | None:
        """Bring parts to the nodes that lack them: their folders there, by node and part; None if one did not arrive.

        Args:
            identity: of the copy.
            receivers: node and part -> the rank on that node that receives it.
            givers: part -> the rank that sends it.
            offers: part -> its folder on this machine, of those that are wanted.
            sizes: by rank, part -> the sizes of its files.
            group: of all processes.
        """
        step = next(each.info.step for copies in self._seen for each in copies if each.info.copy == identity)
        gives, takes, made, problem = [], [], {}, ""
        try:
            for (node, name), receiver in sorted(receivers.items()):
                giver = givers[name]
                if giver == self._rank:
                    gives.append(Give(receiver, offers[name]))
                if receiver == self._rank:
                    made[node, name] = folder = self._place.shard(name).begin(step)
                    takes.append(Take(giver, folder, sizes[giver][name]))
        except OSError as error:
            problem = error.strerror or str(error)
        try:
            problem = first_problem(self._ranks.gather(problem)) or swap(group, gives, takes)
            problem = first_problem(self._ranks.gather(problem))
            if problem:
                self._problems.append(problem)
                return None
            for key, folder in made.items():
                made[key] = durable.publish(folder, self._place.shard(key[1]).free_name(step))
            return {key: path for each in self._ranks.gather(made) for key, path in each.items()}
        finally:
            if problem:
                for folder in made.values():
                    shutil.rmtree(folder, ignore_errors=True)

    def _verified(self, name: str, identity: str) -> Path | None:
        """A part on this machine whose bytes are those that were written."""
        for each in self._seen[self._rank]:
            if each.name == name and each.info.copy == identity:
                problem = problem_of(each.path, FILES)
                if not problem:
                    return each.path
                self._problems.append(f"{each.path}: {problem}")
        return None
