"""The differences that a run has had, and whether a machine had one before. Plain values only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_NAMED = 4
"""Tensors that a message names."""


class Seen(NamedTuple):
    """A check that found a difference.

    Args:
        step: attempted steps then.
        applied: applied steps then.
        named: whether a majority of the copies was equal, so that ``ranks`` are those that deviate; else they are all
            ranks with a copy.
        ranks: in ascending order.
        hosts: host name of each of ``ranks``.
    """

    step: int
    applied: int
    named: bool
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]

    @property
    def where(self) -> str:
        """The ranks and their hosts, for messages."""
        each = [f"rank {rank} (host {host})" for rank, host in zip(self.ranks, self.hosts, strict=True)]
        return " and ".join(filter(None, (", ".join(each[:-1]), each[-1])))


class ReplicaState(NamedTuple):
    """What `CheckReplicas` stores in a checkpoint.

    Args:
        checks: checks made.
        seen: the differences, oldest first.
        left_out: keys of optimizer state that each rank has for itself; None: it is not known yet.
    """

    checks: int = 0
    seen: tuple[Seen, ...] = ()
    left_out: tuple[str, ...] | None = None


def seen_before(new: Seen, history: Iterable[Seen]) -> Seen | None:
    """The last difference of one of the same ranks on the same host; a rank that was moved to another one is another.

    If no majority tells which of the ranks deviates, only another such difference counts.

    >>> first = Seen(100, 100, True, (1,), ("node7",))
    >>> seen_before(Seen(300, 200, True, (1, 2), ("node7", "node8")), [first]) == first
    True
    >>> seen_before(Seen(300, 200, True, (1,), ("node9",)), [first]) is None
    True
    """
    mine = set(zip(new.ranks, new.hosts, strict=True))
    same = [each for each in history if each.named == new.named]
    return next((each for each in reversed(same) if mine & set(zip(each.ranks, each.hosts, strict=True))), None)


def description(new: Seen, tensors: Sequence[str], good_at: int | None) -> str:
    """What differs where, for the event.

    Args:
        new: the difference.
        tensors: what differs, at least one.
        good_at: attempted steps at the last check without a difference; None: there was none.

    >>> description(Seen(400, 398, True, (1,), ("node7",)), ["net.weight"], 300)  # doctest: +ELLIPSIS
    '1 tensor differs between ranks: net.weight deviates on rank 1 (host node7) from most copies; all were equal ...'
    """
    more = f" and {len(tensors) - _NAMED} more" if len(tensors) > _NAMED else ""
    listed, one = ", ".join(tensors[:_NAMED]) + more, len(tensors) == 1
    found = f"{len(tensors)} tensor{' differs' if one else 's differ'} between"
    if new.named:
        found += f" ranks: {listed} deviate{'s' if one else ''} on {new.where} from most copies"
    else:
        found += f" {new.where}: {listed}; no majority tells which is wrong"
    return f"{found}; " + ("this is the first check" if good_at is None else f"all were equal after step {good_at}")


def remedy(new: Seen, before: Seen) -> str:
    """What to do about a machine that had a difference before."""
    hosts = " or ".join(dict.fromkeys(new.hosts))
    which = "replace this machine" if new.named else "test these machines, and replace the faulty one"
    cause = ""
    if new.applied == before.applied:
        cause = "; since it was at the same step of the data, look for code that only some ranks run, too"
    return f"the same happened at step {before.step}: {which}: {hosts}{cause}"
