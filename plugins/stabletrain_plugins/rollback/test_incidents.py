"""Where an incident begins and ends, and what is remembered of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stabletrain.core.outcome import Outcome
from stabletrain.core.state import from_plain, to_plain
from stabletrain_plugins.rollback.incidents import RECOVERY_STEPS, IncidentState, IncidentTracker


def follow(tracker: IncidentTracker, healthy: str, start: int = 0) -> None:
    """One character for each step: ``.`` is healthy, ``x`` is not, ``n`` is not finite."""
    for step, each in enumerate(healthy, start):
        mark: Any = f"mark {step}"
        tracker.on_step_end(step, step, mark)
        loss = math.nan if each == "n" else float(step)
        tracker.on_outcome(each == ".", Outcome(step, loss, 1.0, 1.0, 1.0), step)


def test_an_incident_lasts_until_the_run_has_recovered() -> None:
    """Bugs: each bad step is an incident of its own; or an incident never ends."""
    tracker = IncidentTracker(3)
    follow(tracker, "...xx" + "." * (RECOVERY_STEPS - 1))
    assert tracker.current == (3, 3, "mark 3")
    assert tracker.losses == (11.0, 12.0, 13.0), "its last steps, healthy ones too"
    assert tracker.norms == (1.0, 1.0, 1.0)
    follow(tracker, ".", 14)
    assert tracker.current is None
    assert tracker.losses == ()


def test_steps_that_are_not_finite_have_no_level() -> None:
    """Bug: a NaN in the level that all rules learn."""
    tracker = IncidentTracker(3)
    follow(tracker, "xnxnnx")
    assert tracker.losses == (0.0, 2.0, 5.0)
    assert tracker.unhealthy_in_a_row == 6


@pytest.mark.parametrize("cut", range(1, 24))
def test_continued_from_a_checkpoint(cut: int) -> None:
    """Bug: a resumed run closes an incident later, or checks the weights at another step."""
    steps = "..xx.xn....x..........x.."
    whole, resumed = IncidentTracker(4), IncidentTracker(4)
    follow(whole, steps)
    before = IncidentTracker(4)
    follow(before, steps[:cut])
    resumed.load(from_plain(IncidentState, to_plain(before.state())))
    assert resumed.current is None or resumed.current.mark is None
    follow(resumed, steps[cut:], cut)
    assert resumed.state() == whole.state()
    assert resumed.current is None or resumed.current.mark == f"mark {max(cut, resumed.current.step)}"


def test_another_patience_in_the_checkpoint() -> None:
    """Bug: a run cannot be resumed with another ``patience``."""
    tracker = IncidentTracker(2)
    tracker.load(IncidentState((5, 5), 0, 3, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
    assert (tracker.losses, tracker.norms) == ((2.0, 3.0), (5.0, 6.0))
