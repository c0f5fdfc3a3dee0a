"""Whether a run that has died is restarted. Pure: it sees the record of the attempts and nothing else.

What is bounded is the number of restarts without progress. A machine that dies once a day is restarted for ever; a
fault that comes back at one place ends the run, with a message that says where to look.
"""

from __future__ import annotations

from collections.abc import Sequence

from stabletrain.launch.attempts import Attempt
from stabletrain.launch.result import Result

_DIED = ("failed", "killed")
_MOST = 8
"""How many attempts a message lists."""


def without_progress(attempts: Sequence[Attempt], progress_steps: int) -> list[Attempt]:
    """Return the attempts that count: those that died since the run last came ``progress_steps`` further.

    An attempt that was preempted, or ended by its user, does not count.

    Args:
        attempts: of the run, in order.
        progress_steps: so many steps beyond the first death of a series begin a new one, >= 1.

    >>> died = [Attempt(attempt=n, start="", end="", cause="killed", step=s) for n, s in ((1, 10), (2, 12), (3, 300))]
    >>> [each.attempt for each in without_progress(died, 200)], [each.attempt for each in without_progress(died, 500)]
    ([3], [1, 2, 3])
    """
    series: list[Attempt] = []
    for attempt in attempts:
        if attempt.cause not in _DIED:
            continue
        if series and attempt.step >= series[0].step + progress_steps:
            series = []
        series.append(attempt)
    return series


def given_up(attempts: Sequence[Attempt], progress_steps: int, report: str) -> Result:
    """Return the end of a run that has no restart left: which attempts died where, and what to look at.

    Args:
        attempts: of the run, in order.
        progress_steps: see `without_progress`.
        report: where the report of the last death is.
    """
    died = without_progress(attempts, progress_steps)
    steps = [each.step for each in died]
    where = f"at step {steps[0]}" if len(set(steps)) == 1 else f"at steps {', '.join(map(str, steps[-_MOST:]))}"
    count = f"{len(died)} attempts died {where}, without {progress_steps} steps of progress between them"
    last = died[-1]
    same_ranks = last.ranks if len({each.ranks for each in died}) == 1 else ()
    if same_ranks and len(set(steps)) == 1 and len({each.message for each in died}) == 1:
        what = f"each time the same: {last.message}. The fault is at this place, not in the machine"
        look = f"look at the code, and at the data of step {last.step}"
    elif same_ranks:
        named = f"rank {same_ranks[0]}" if len(same_ranks) == 1 else f"ranks {', '.join(map(str, same_ranks[:_MOST]))}"
        what = f"each time {named}{f' on {last.host}' if last.host else ''}; the last time: {last.message}"
        look = "look at that rank's log, memory and device, and at the data of these steps"
    else:
        what = f"the last time: {last.message}"
        look = "look at the data of these steps, and at the memory of the machine"
    return Result(
        end="stopped",
        message=f"given up: {count} (launch.restarts, launch.progress_steps); {what}; {look}, {report}",
        steps=last.step,
    )
