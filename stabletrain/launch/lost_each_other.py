"""The message of a run in which no process failed by itself: they waited for each other in vain."""

from __future__ import annotations

from collections.abc import Sequence

from stabletrain.launch.rank_ends import RankEnd
from stabletrain.launch.result import Result

_MOST = 8
"""How many ranks a message describes."""


def lost_each_other(ends: Sequence[RankEnd], silent: Sequence[int], timeout: float | None) -> Result | None:
    """Return the end of a run whose processes did not meet in a collective; None if they merely lost a connection.

    Args:
        ends: of the processes; all of them are consequences, or have finished.
        silent: ranks that wrote nothing.
        timeout: of the process group, ``launch.timeout``, in seconds; None if it is the strategy's own.
    """
    ends = sorted(ends, key=lambda end: end.rank)
    limit = f"for {timeout:g} s (launch.timeout)" if timeout else "until the process group's timeout"
    waiting = [end for end in ends if end.lost == "timeout"]
    finished = [end for end in ends if end.result.end == "finished"]
    others = [end for end in ends if end.result.end != "finished"]
    if waiting and silent:
        names = ", ".join(f"rank {rank}" for rank in silent[:_MOST])
        text = f"{names} did not answer {limit}, and {_described(waiting)} waited for it: it was stopped, or its node"
        return Result(end="failed", message=f"{text} or network failed; resume from the last checkpoint")
    if finished and any(end.lost for end in others):
        done = ", ".join(f"rank {end.rank} (after {end.result.steps} steps)" for end in finished[:_MOST])
        text = f"{done} left the training loop, while {_described(others)} waited for it: {_ADVICE}"
        return Result(end="failed", message=text)
    if any(end.lost == "different" for end in ends):
        return Result(end="failed", message=f"the ranks called different collectives: {_described(others)}; {_ADVICE}")
    if waiting:
        text = f"the ranks did not meet in a collective {limit}: {_described(others)}; {_ADVICE}"
        return Result(end="failed", message=f"{text}. If one rank may need that long, raise launch.timeout")
    return None


_ADVICE = (
    "every rank must train on the same number of batches and take the same branches, at least those that contain a "
    "forward, a backward or another collective; let the ranks decide together"
)


def _described(ends: Sequence[RankEnd]) -> str:
    shown = [f"rank {end.rank}{_where(end)}" for end in ends[:_MOST]]
    return ", ".join(shown) + (f" and {len(ends) - _MOST} more" if len(ends) > _MOST else "")


def _where(end: RankEnd) -> str:
    parts = ([f"at {end.at}"] if end.at else []) + ([f"in {end.place}"] if end.place else [])
    return f" {' '.join(parts)}" if parts else ""
