"""One end of a run from the ends of its processes: the first cause, not what followed from it.

When one process fails, the others lose their connection to it, or torchrun or SLURM ends them by SIGTERM. Taken for the
run's end, that SIGTERM would make a scheduler repeat a run with a bug for ever.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace

from stabletrain.launch.bounded import one_message
from stabletrain.launch.lost_each_other import lost_each_other
from stabletrain.launch.process import ProcessEnd
from stabletrain.launch.rank_ends import RankEnd
from stabletrain.launch.result import End, Result

_BY_SIGNAL = ("interrupted", "terminated")


def first_cause(
    ends: Sequence[RankEnd], ended: ProcessEnd, *, size: int, exits: Mapping[int, int], timeout: float | None = None
) -> Result | None:
    """Return how a run ended.

    Args:
        ends: what the processes wrote, at most one for each rank.
        ended: how the worker, or the program that started the workers, ended.
        size: number of processes.
        exits: exit codes of processes that torchrun reported, by rank.
        timeout: of the process group, in seconds; None if it is the strategy's own.

    Returns:
        The end: of the first process that failed by itself, or of all of them if they ended together; else of one that
        died without a word; else by a signal; else how they waited for each other in vain; else of the first that lost
        its connection. None if no process wrote
        anything and only ``ended`` is known.
    """
    if not ends:
        return _died(sorted(exits), ended, exits, ends) if exits and ended.signum is None else None
    cause = _cause(ends, ended, size, exits, timeout)
    if isinstance(cause, RankEnd):
        return _joined(cause, ends, size)
    first = ends[0].result
    return replace(first, end=cause.end, message=cause.message, checkpoint=first.checkpoint)


def blamed(
    ends: Sequence[RankEnd], ended: ProcessEnd, *, size: int, exits: Mapping[int, int], timeout: float | None = None
) -> tuple[tuple[int, ...], RankEnd | None]:
    """Return which ranks ended a run, and what the first of them wrote, if it wrote its end; the rest are consequences.

    Args:
        ends: as for `first_cause`.
        ended: as for `first_cause`.
        size: as for `first_cause`.
        exits: as for `first_cause`.
        timeout: as for `first_cause`.

    Returns:
        No rank if torchrun died, or if nobody knows.
    """
    if not ends:
        return tuple(sorted(exits)), None
    cause = _cause(ends, ended, size, exits, timeout)
    if isinstance(cause, RankEnd):
        return (cause.rank,), cause
    silent = _silent(ends, size)
    reported = [rank for rank in silent if rank in exits]
    return () if ended.abandoned else tuple(reported or silent), None


def _silent(ends: Sequence[RankEnd], size: int) -> list[int]:
    """The ranks that wrote nothing."""
    wrote = {end.rank for end in ends}
    return [rank for rank in range(size) if rank not in wrote]


def _cause(
    ends: Sequence[RankEnd], ended: ProcessEnd, size: int, exits: Mapping[int, int], timeout: float | None
) -> RankEnd | Result:
    in_time = sorted(ends, key=lambda end: end.time_ns)
    own = [end for end in in_time if not end.consequence and end.result.end != "finished"]
    if ended.abandoned and all(end.result.end in _BY_SIGNAL for end in own):
        return Result(end="killed", message=f"torchrun was ended by signal {-ended.code}{_name(-ended.code)}")
    # a SIGTERM that no launcher sent is the user's if all processes ended together, else perhaps torchrun's
    sure = [end for end in own if end.agreed or ended.signum is not None or end.result.end not in _BY_SIGNAL]
    if sure:
        return sure[0]
    silent = _silent(ends, size)
    if silent and ended.signum is not None:
        return by_signal(ended)
    # who did not answer in time was killed only afterwards, by torchrun, and has not died by itself
    if silent and any(exits.get(rank, -signal.SIGKILL) != -signal.SIGKILL for rank in silent):
        return _died(silent, ended, exits, ends)
    if not own and (waited := lost_each_other(ends, silent, timeout)):
        return waited
    if silent:
        return _died(silent, ended, exits, ends)
    if own:
        return own[0]
    return next((end for end in in_time if end.result.end != "finished"), in_time[0])


def _joined(cause: RankEnd, ends: Sequence[RankEnd], size: int) -> Result:
    """The cause's end and message, and the rest as rank 0 knows it."""
    first = next((end.result for end in ends if end.rank == 0), cause.result)
    message = cause.result.message
    if len({end.result.message for end in ends}) > 1 or len(ends) < size:
        if not cause.agreed:
            message = f"rank {cause.rank}: {message}"
        message += _circumstances(cause.at, [end for end in ends if end.rank != cause.rank])
    checkpoint = cause.result.checkpoint or first.checkpoint
    return replace(first, end=cause.result.end, message=one_message(message), checkpoint=checkpoint)


def _circumstances(at: str, others: Sequence[RankEnd]) -> str:
    """When it happened, and which ranks ended as a consequence, in brackets."""
    followed = [end.rank for end in others if end.consequence]
    parts = [f"at {at}"] if at else []
    parts += [f"{ranks(followed)} ended as a consequence"] if followed else []
    return f" ({'; '.join(parts)})" if parts else ""


def _died(silent: Sequence[int], ended: ProcessEnd, exits: Mapping[int, int], ends: Sequence[RankEnd]) -> Result:
    reported = [rank for rank in silent if rank in exits]
    if reported:
        alike = [rank for rank in reported if exits[rank] == exits[reported[0]]]
        found = without_result(exits[reported[0]], ranks(alike), several=len(alike) > 1)
    else:
        found = without_result(ended.code if len(silent) == 1 and ended.code < 0 else None, ranks(silent))
    at = next((end.at for end in sorted(ends, key=lambda end: end.time_ns) if end.at), "")
    return replace(found, message=found.message + _circumstances(at, ends))


def without_result(code: int | None, who: str = "the worker", *, several: bool = False) -> Result:
    """Return the end of a process that died without writing one.

    Args:
        code: its exit code as Python (negative: minus a signal) or a shell (128 + a signal) shows it; None if nobody
            knows it.
        who: the process or processes, for the message.
        several: whether these are several.
    """
    was, it = ("were", "they") if several else ("was", "it")
    if code is None:
        return Result(end="killed", message=f"{who} ended without a word, for example killed by the system")
    signum = -code if code < 0 else code - 128 if code > 128 else None
    if signum == signal.SIGKILL:
        message = f"{who} {was} killed by signal 9 (SIGKILL), for example because {it} ran out of memory"
        return Result(end="killed", message=message)
    if signum is not None:
        text = f"{who} {was} ended by signal {signum}{_name(signum)} before {it} wrote a result"
        if signum == signal.SIGABRT:
            text += "; see its output above. Gloo ends a process so if the ranks have called different collectives, "
            text += "and NCCL if it has waited for the others longer than launch.timeout"
        return Result(end="killed", message=text)
    message = f"{who} ended with exit code {code} before {it} wrote a result; see its output above"
    return Result(end="failed", message=message)


def by_signal(ended: ProcessEnd) -> Result:
    """Return the end of a run that the launcher's user ended by a signal, and whose worker wrote none.

    Args:
        ended: with the first signal that was forwarded.
    """
    assert ended.signum is not None
    end: End = "interrupted" if ended.signum == signal.SIGINT else "terminated"
    name = signal.Signals(ended.signum).name
    how = "; the processes were killed, without a checkpoint" if ended.killed else ", before it wrote a result"
    return Result(end=end, message=f"ended by {name}{how}")


def ranks(numbers: Sequence[int]) -> str:
    """Return text for some ranks.

    Args:
        numbers: at least one.

    >>> ranks([3]), ranks([0, 2])
    ('rank 3', 'ranks 0, 2')
    """
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    shown = ", ".join(map(str, numbers[:8]))
    return f"ranks {shown}{', ...' if len(numbers) > 8 else ''}"


def _name(signum: int) -> str:
    try:
        return f" ({signal.Signals(signum).name})"
    except ValueError:
        return ""
