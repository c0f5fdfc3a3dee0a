"""Compare the time of a step between cases that differ by microseconds, on a machine that other work shares.

Each case trains in a process of its own, forked from this one, so that memory and caches are alike and nothing that one
case changes is seen by another. The processes take turns: a baton goes round, and whoever holds it makes a few dozen
steps while the others wait. So all cases see the same minutes of the machine. Of the times of all steps a low quantile
is compared, since other work can only make a step longer.

Whole fits in turn, and cases that are switched on and off within one process, were tried: both scatter by tens of
microseconds, because of memory addresses and of code that adapts to what it has seen.
"""

from __future__ import annotations

import gc
import math
import multiprocessing as mp
import os
import random
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Semaphore
from typing import NamedTuple, TypeAlias

QUANTILE = 0.08
"""Of the times of all steps: low, and not the lowest, which a clock's jitter decides."""
_DRAWS = 40
"""Resamples for the standard error."""


class Pace:
    """Called at the beginning of each step: notes its time, and passes the baton on after a block of steps.

    Args:
        mine: released when it is this case's turn.
        following: released when this case has made a block of steps.
        block: number of steps in a turn.
    """

    def __init__(self, mine: Semaphore, following: Semaphore, block: int) -> None:
        self._mine, self._following, self._block = mine, following, block
        self.nanoseconds: list[int] = []
        self._began = 0
        self._last = 0

    def __call__(self) -> None:
        now = time.perf_counter_ns()
        if self._began:
            self.nanoseconds.append(now - self._last)
        if self._began % self._block == 0:
            if self._began:
                self._following.release()
            self._mine.acquire()
        self._began += 1
        self._last = time.perf_counter_ns()

    def __deepcopy__(self, memo: object) -> Pace:
        return self  # copies of a module, as averaged weights are, belong to the same case


Case: TypeAlias = Callable[[Pace], None]
"""Trains, and calls its argument at the beginning of each step; all cases make the same number of steps."""


class StepTimes(NamedTuple):
    """The times of one case's steps.

    Args:
        microseconds: of each step, without the first ones; steps of equal number in all cases.
    """

    microseconds: list[float]

    @property
    def usual(self) -> float:
        """What each step takes, microseconds."""
        return _quantile(self.microseconds)

    @property
    def error(self) -> float:
        """Standard error of `usual`, from resampled blocks of 50 steps."""
        chosen = random.Random(0)
        blocks = [self.microseconds[i : i + 50] for i in range(0, len(self.microseconds) - 49, 50)]
        draws = [_quantile([t for b in chosen.choices(blocks, k=len(blocks)) for t in b]) for _ in range(_DRAWS)]
        return statistics.stdev(draws)

    def mean_over(self, period: int) -> float:
        """What a step takes on average, with what is done in some steps only, microseconds.

        Args:
            period: number of steps after which all work recurs. Each place within it has a low quantile of its own, so
                that a slow moment of the machine does not count.
        """
        return statistics.fmean(_quantile(self.microseconds[place::period], 0.25) for place in range(period))


def compare(cases: Mapping[str, Case], block: int = 25, skip: int = 200) -> dict[str, StepTimes]:
    """Train all cases in turns of a few steps; the times of each one's steps.

    Args:
        cases: each as a function that trains.
        block: steps in a turn.
        skip: number of first steps that do not count.

    Raises:
        RuntimeError: if a case raised an error, with its traceback.
    """
    context = mp.get_context("fork")
    turns = [context.Semaphore(0) for _ in cases]
    processes, results = [], []
    gc.collect()
    gc.freeze()  # what exists is shared with the children, and not to be looked at in each of them
    for i, (name, case) in enumerate(cases.items()):
        receive, send = context.Pipe(duplex=False)
        pace = Pace(turns[i], turns[(i + 1) % len(turns)], block)
        processes.append(context.Process(target=_run, args=(case, pace, send), name=name))
        processes[-1].start()
        send.close()
        results.append(receive)
    turns[0].release()
    times: dict[str, StepTimes] = {}
    try:
        while len(times) < len(cases):
            for ready in wait([r for r, name in zip(results, cases, strict=True) if name not in times]):
                name = list(cases)[results.index(ready)]  # type: ignore[arg-type]
                times[name] = StepTimes([t / 1e3 for t in _received(name, ready)[skip:]])  # type: ignore[arg-type]
    finally:
        for process in processes:
            process.join(10 if len(times) == len(cases) else 0)
            process.kill()
        gc.unfreeze()
    return {name: times[name] for name in cases}


def _run(case: Case, pace: Pace, results: Connection) -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        case(pace)
        results.send(pace.nanoseconds)
    except BaseException:
        results.send(traceback.format_exc())
    finally:
        pace._following.release()
        results.close()
        os._exit(0)  # without what the parent registered for its own end


def _received(name: str, connection: Connection) -> Sequence[int]:
    try:
        found = connection.recv()
    except EOFError:
        raise RuntimeError(f"{name}: the process has ended without a result") from None
    if isinstance(found, str):
        raise RuntimeError(f"{name}:\n{found}")
    return list(found)


def _quantile(values: Sequence[float], share: float = QUANTILE) -> float:
    return sorted(values)[math.floor(len(values) * share)]
