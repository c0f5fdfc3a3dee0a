"""Which process of which other node keeps the part of each process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning.pytorch import Trainer

from stabletrain.runtime.ranks import Ranks


class Member(NamedTuple):
    """A process.

    Args:
        node: number of its node, as torchrun, SLURM or Lightning give it.
        place: its number among the processes of its node.
    """

    node: int
    place: int


class Nodes:
    """The nodes of a run.

    Args:
        members: the processes, by rank.

    >>> nodes = Nodes([Member(0, 0), Member(0, 1), Member(1, 0), Member(1, 1)])
    >>> [nodes.keepers(rank, 1) for rank in range(4)], nodes.sources(0, 1)
    ([[2], [3], [0], [1]], [2])
    >>> [rank for rank in range(4) if nodes.leads(rank)], nodes.mates(3)
    ([0, 2], [2, 3])
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._by_node: dict[int, list[int]] = {}
        for rank in sorted(range(len(members)), key=lambda rank: members[rank]):
            self._by_node.setdefault(members[rank].node, []).append(rank)

    @classmethod
    def of(cls, trainer: Trainer) -> Nodes:
        """The nodes of a trainer whose strategy has set up its environment. A collective."""
        return cls(Ranks(trainer).gather(Member(trainer.node_rank, trainer.local_rank)))

    @property
    def count(self) -> int:
        """Number of nodes."""
        return len(self._by_node)

    def mates(self, rank: int) -> list[int]:
        """The processes on the node of a process, itself included."""
        return self._by_node[self.members[rank].node]

    def leads(self, rank: int) -> bool:
        """Whether a process is the first of its node."""
        return self.mates(rank)[0] == rank

    def keepers(self, rank: int, copies: int) -> list[int]:
        """The processes that keep the part of a process: those with the same place on the next nodes.

        Args:
            rank: of the process.
            copies: number of other nodes; there may be fewer.
        """
        order = list(self._by_node)
        mine = order.index(self.members[rank].node)
        place = self.mates(rank).index(rank)
        others = [order[(mine + i) % len(order)] for i in range(1, min(copies, len(order) - 1) + 1)]
        return [self._by_node[node][place % len(self._by_node[node])] for node in others]

    def sources(self, rank: int, copies: int) -> list[int]:
        """The processes whose part a process keeps.

        Args:
            rank: of the process.
            copies: as for `keepers`.
        """
        return [each for each in range(len(self.members)) if rank in self.keepers(each, copies)]
