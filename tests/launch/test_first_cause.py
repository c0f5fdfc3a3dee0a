"""One end from the ends of all processes: every combination of a first cause and what follows from it."""

import itertools
import signal
from typing import Any

import pytest

from stabletrain.launch.first_cause import first_cause, without_result
from stabletrain.launch.process import ProcessEnd
from stabletrain.launch.rank_ends import RankEnd
from stabletrain.launch.result import Result

FAILED = ProcessEnd(code=1)


def end(rank: int, at: int, end: Any, message: str = "", **more: Any) -> RankEnd:
    checkpoint, more["at"] = more.pop("checkpoint", None), more.pop("at_", "")
    return RankEnd(rank=rank, time_ns=at, result=Result(end=end, message=message, checkpoint=checkpoint), **more)


def bug(rank: int, at: int = 10) -> RankEnd:
    return end(rank, at, "failed", "RuntimeError: a bug")


def lost(rank: int, at: int = 20, **more: Any) -> RankEnd:
    return end(rank, at, "failed", "RuntimeError: connection closed by peer", consequence=True, **more)


def sigterm(rank: int, at: int = 20, **more: Any) -> RankEnd:
    return end(rank, at, "terminated", "ended by SIGTERM", **more)


SAVED = {"agreed": True, "checkpoint": "/run/checkpoints/interrupted.ckpt"}

CASES: dict[str, tuple[list[RankEnd], dict[int, int], ProcessEnd, str, str]] = {
    "a bug, the other lost its peer": ([bug(1), lost(0)], {1: 1}, FAILED, "failed", "rank 1: RuntimeError: a bug"),
    "a bug, the other got torchrun's SIGTERM": ([bug(1), sigterm(0)], {1: 1}, FAILED, "failed", "rank 1: Runt"),
    "a bug, the other was killed": ([bug(1)], {1: 1}, FAILED, "failed", "rank 1: RuntimeError: a bug"),
    "a bug seen late by a skewed clock": ([bug(1, at=30), lost(0)], {1: 1}, FAILED, "failed", "rank 1: Runt"),
    "the same bug on both": ([bug(0), bug(1)], {0: 1, 1: 1}, FAILED, "failed", "RuntimeError: a bug"),
    "killed, the other lost its peer": ([lost(0)], {1: -9}, FAILED, "killed", "rank 1 was killed by signal 9"),
    "killed, the other got a SIGTERM": ([sigterm(0)], {1: -9}, FAILED, "killed", "rank 1 was killed by signal 9"),
    "left by os._exit": ([lost(0)], {1: 7}, FAILED, "failed", "rank 1 ended with exit code 7"),
    "left by os._exit(0)": ([lost(0)], {0: 1}, FAILED, "killed", "rank 1 ended without a word"),
    "the other finished": ([end(0, 9, "finished"), bug(1)], {1: 1}, FAILED, "failed", "rank 1: RuntimeError"),
    "all lost their peer": ([lost(0), lost(1, at=19)], {}, FAILED, "failed", "RuntimeError: connection"),
    "all waited in vain": (
        [lost(0, lost="timeout", at_="step 2", place="backward"), lost(1, lost="connection", place="a.py, line 3")],
        {}, FAILED, "failed",
        "the ranks did not meet in a collective for 5 s (launch.timeout): rank 0 at step 2 in backward, rank 1 in a"),
    "one waited, the other hung and got a SIGTERM": (
        [lost(0, lost="timeout"), sigterm(1, consequence=True, place="a.py, line 3")], {0: 1}, FAILED, "failed",
        "the ranks did not meet in a collective for 5 s (launch.timeout): rank 0, rank 1 in a.py, line 3"),
    "one waited, the other was stopped": (
        [lost(0, lost="timeout")], {0: 1, 1: -9}, FAILED, "failed", "rank 1 did not answer for 5 s (launch.timeout)"),
    "one waited, the other crashed": ([lost(0, lost="timeout")], {1: -11}, FAILED, "killed", "rank 1 was ended by sig"),
    "a bug in one that the other waited for": (
        [bug(1, at=30), lost(0, lost="timeout")], {}, FAILED, "failed", "rank 1: RuntimeError: a bug"),
    "one left the loop": (
        [end(0, 9, "finished"), lost(1, lost="connection")], {}, FAILED, "failed", "rank 0 (after 0 steps) left the"),
    "different collectives": (
        [lost(0, lost="different"), lost(1, lost="connection")], {}, FAILED, "failed", "the ranks called different"),
    "all finished": ([end(0, 9, "finished"), end(1, 8, "finished")], {}, ProcessEnd(code=0), "finished", ""),
    "finished, then abort": ([end(0, 9, "finished"), end(1, 8, "finished")], {1: -6}, FAILED, "finished", ""),
    "one SIGTERM, all saved": ([sigterm(0, **SAVED), sigterm(1, **SAVED)], {}, FAILED, "terminated", "ended by"),
    "saved, then a bug in tearing down": (
        [sigterm(0, at=9, **SAVED), bug(1)], {1: 1}, FAILED, "terminated", "ended by SIGTERM"),
    "SIGTERM to all in start-up": ([sigterm(0), sigterm(1)], {}, FAILED, "terminated", "ended by SIGTERM"),
    "Ctrl-C, then killed": ([], {}, ProcessEnd(code=-9, signum=signal.SIGINT, killed=True), "none", ""),
    "Ctrl-C, one wrote its end": (
        [sigterm(0)], {}, ProcessEnd(code=1, signum=signal.SIGTERM), "terminated", "rank 0: ended by SIGTERM"),
    "Ctrl-C, one lost the killed other": (
        [lost(0)], {}, ProcessEnd(code=1, signum=signal.SIGINT), "interrupted", "ended by SIGINT"),
    "a bug, then Ctrl-C": ([bug(1), lost(0)], {}, ProcessEnd(code=1, signum=signal.SIGINT), "failed", "rank 1: Runt"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_first_cause_is_the_runs_end(case: str) -> None:
    """Bugs: torchrun's SIGTERM or a lost connection counts as the end, and a scheduler repeats a bug for ever; of
    ranks that waited in vain nobody learns where."""
    ends, exits, ended, expected, message = CASES[case]
    for order in itertools.permutations(ends):
        result = first_cause(order, ended, size=2, exits=exits, timeout=5)
        if expected == "none":
            assert result is None
            return
        assert result is not None
        assert result.end == expected
        assert result.message.startswith(message), result.message


def test_consequences_are_marked_and_the_rest_comes_from_rank_0() -> None:
    """Bugs: nobody can see why the other ranks ended; steps and metrics are those of a rank without metrics."""
    first = RankEnd(rank=0, time_ns=20, consequence=True, result=Result(end="failed", steps=7, metrics={"loss": 1.0}))
    cause = end(1, 10, "failed", "RuntimeError: a bug", at_="step 7")
    result = first_cause([first, cause, lost(2)], FAILED, size=3, exits={1: 1})
    assert result is not None
    assert result.message == "rank 1: RuntimeError: a bug (at step 7; ranks 0, 2 ended as a consequence)"
    assert (result.end, result.steps, result.metrics) == ("failed", 7, {"loss": 1.0})


@pytest.mark.parametrize(
    ("code", "expected", "message"),
    [
        (-9, "killed", "killed by signal 9 (SIGKILL), for example because it ran out of memory"),
        (137, "killed", "killed by signal 9"),
        (-11, "killed", "signal 11 (SIGSEGV)"),
        (-99, "killed", "signal 99"),
        (0, "failed", "exit code 0"),
        (7, "failed", "exit code 7"),
        (None, "killed", "without a word"),
    ],
)
def test_a_worker_without_a_word(code: int | None, expected: str, message: str) -> None:
    """Bug: an exit code of 0 without a result is a success; an unknown signal is a traceback."""
    result = without_result(code)
    assert result.end == expected
    assert message in result.message
