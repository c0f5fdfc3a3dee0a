"""Signals of a process: which one decides, which ones count, and what children do."""

import os
import signal
from collections.abc import Iterator

import pytest

from stabletrain.runtime import signal_watch
from stabletrain.runtime.signal_watch import SAME_PRESS, Interrupted, SignalWatch

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(signal_watch.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("presses", "ends_at", "decides"),
    [
        ([(0.0, INT)], None, INT),
        ([(0.0, INT), (SAME_PRESS / 2, INT)], None, INT),  # twice the same press
        ([(0.0, TERM), (SAME_PRESS / 2, INT)], None, TERM),
        ([(0.0, INT), (SAME_PRESS, INT)], 1, INT),
        ([(0.0, INT), (5.0, TERM)], 1, INT),
        ([(0.0, TERM), (5.0, TERM)], 1, TERM),
        ([(0.0, HUP), (5.0, INT)], 1, HUP),
    ],
)
def test_the_first_signal_decides_and_a_later_one_ends(
    presses: list[tuple[float, signal.Signals]], ends_at: int | None, decides: signal.Signals, clock: list[float]
) -> None:
    """Bugs: Ctrl-C twice says "terminated"; one press that arrives twice loses the checkpoint."""
    watch = SignalWatch(patient=True)
    for index, (at, signum) in enumerate(presses):
        clock[0] = 100.0 + at
        if index == ends_at:
            with pytest.raises(Interrupted, match=decides.name):
                watch._handle(signum, None)
        else:
            watch._handle(signum, None)
    assert watch.signum == decides


def test_a_process_that_cannot_wait_ends_at_once(clock: list[float]) -> None:
    """Bugs: a signal before training is only remembered; a rank whose peer has failed waits for its batch for ever."""
    with pytest.raises(Interrupted, match="SIGINT"):
        SignalWatch()._handle(INT, None)
    watch = SignalWatch(patient=True)
    watch.must_not_wait = lambda: True
    watch.lost = lambda: "without a checkpoint; 3 steps are lost"
    with pytest.raises(Interrupted, match="SIGTERM without a checkpoint; 3 steps are lost"):
        watch._handle(TERM, None)
    watch._handle(TERM, None)  # the same signal again, while the first one is being handled


def test_a_process_that_is_ending_is_not_disturbed(clock: list[float]) -> None:
    """Bug: a signal while the result is written leaves none, and a traceback."""
    watch = SignalWatch()
    watch.ignore()
    for at in (100.0, 200.0, 300.0):
        clock[0] = at
        watch._handle(INT, None)
    assert watch.signum == INT


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (INT, TERM, HUP)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_nohup_is_respected(before: signal.Handlers, handlers: None) -> None:
    """Bug: a run under nohup ends when its terminal is closed."""
    signal.signal(HUP, before)
    watch = SignalWatch()
    watch.install()
    assert (signal.getsignal(HUP) == signal.SIG_IGN) == (before == signal.SIG_IGN)
    assert signal.getsignal(TERM) == watch._handle


def test_a_forked_process_leaves_the_decision_to_its_parent(handlers: None) -> None:
    """Bug: a data loader's process survives its SIGTERM, and Ctrl-C raises an exception in it."""
    watch = SignalWatch(patient=True)
    watch.install()
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), INT)
        if watch.received:
            os._exit(1)
        os.kill(os.getpid(), TERM)
        os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -TERM
