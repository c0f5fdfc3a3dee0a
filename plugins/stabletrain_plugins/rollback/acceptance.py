"""Decides whether an incident is an error, or a change of the training that is meant. Plain values only.

A rollback is an experiment: the offending batches are excluded, and the steps are made again. If the loss then leaves
its level at the same position, by as much as before, and the weights are not damaged, neither the batches nor the
weights were the cause: the module does something else from there on, such as another loss term or new classes. Going
back once more would not change that. So the new level is learned, and training continues.
"""

from __future__ import annotations

import math
import statistics
from enum import Enum, auto
from typing import NamedTuple

_NEAR = 10
"""Applied steps within which two incidents are at the same position."""
_SAME_LEVEL = 2.0
"""Factor within which the excess of two incidents over the usual loss is the same."""
_REMEMBERED = 8
"""Number of incidents that are remembered."""


class Place(NamedTuple):
    """An incident that led to a rollback.

    Args:
        applied: applied steps before it.
        excess: median loss in the incident minus the usual loss, 0 if it was not raised; None if it is not known.
        rollback: index of the rollback among those of the run.
    """

    applied: int
    excess: float | None
    rollback: int


class Accepting(NamedTuple):
    """What a decision depends on besides the present incident; part of a checkpoint.

    Args:
        places: the last incidents, oldest first.
        accepted: applied steps at the position of the level accepted last; None: there is none.
    """

    places: tuple[Place, ...] = ()
    accepted: int | None = None


class IncidentLevel(NamedTuple):
    """The loss in the present incident.

    Args:
        since: attempted steps before its first step.
        applied: applied steps before it.
        attempted: attempted steps so far.
        losses: its last finite losses, at most ``patience``.
        centre: the usual loss; NaN if it is not known yet.
        margin: a loss so much above ``centre`` is not raised: its distance from there is noise.
        by_speed: the request is about the speed of the weights, not about the loss.
    """

    since: int
    applied: int
    attempted: int
    losses: tuple[float, ...]
    centre: float
    margin: float = 0.0
    by_speed: bool = False

    def excess(self, patience: int) -> float | None:
        """The median loss minus the usual one, 0 if it is not raised; None while it is not known."""
        if self.by_speed or len(self.losses) < patience or math.isnan(self.centre):
            return None
        excess = statistics.median(self.losses) - self.centre
        return excess if excess > self.margin else 0.0


class Verdict(Enum):
    """What to do about a request for a rollback."""

    ROLL_BACK = auto()
    """The incident is new: make the rollback."""
    WAIT = auto()
    """Going back did not change it, but there is too little evidence: continue, with outliers dropped."""
    ACCEPT = auto()
    """The level is meant: learn it."""


class LastRollback(NamedTuple):
    """The rollback made last.

    Args:
        attempted: attempted steps when it was made.
        restored: applied steps of the restored state.
        number: its index among the rollbacks of the run.
    """

    attempted: int
    restored: int
    number: int


def judge(
    incident: IncidentLevel,
    memory: Accepting,
    last: LastRollback | None,
    *,
    accept_after: int,
    patience: int,
    cool_down: int,
) -> Verdict:
    """Decide whether an incident is a repetition that going back did not change.

    It is a repetition if an earlier incident began within 10 applied steps of the same position, or if it begins within
    10 steps after the state that was restored for the last one, and if both are at the same level as far as known:
    their excess over the usual loss differs by less than a factor of 2. It is accepted ``accept_after`` steps after its
    beginning; if its loss cannot be judged by twice as many steps, it is rolled back. Within ``cool_down`` steps after
    an accepted level, a further rise belongs to the same change and is accepted as soon as it has lasted ``patience``
    steps.

    Args:
        incident: the present incident; the weights are not damaged, and its last steps are finite.
        memory: earlier incidents.
        last: the last rollback; None: there was none.
        accept_after: attempted steps after which a repetition is accepted; at least ``patience`` of them.
        patience: steps by whose loss a level is judged.
        cool_down: applied steps after an accepted level in which further rises belong to it.

    >>> earlier = Accepting((Place(applied=500, excess=1.1, rollback=0),))
    >>> again = IncidentLevel(since=560, applied=501, attempted=625, losses=(2.0,) * 20, centre=1.0)
    >>> judge(again, earlier, LastRollback(535, 450, 0), accept_after=60, patience=20, cool_down=100).name
    'ACCEPT'
    """
    accept_after = max(accept_after, patience)
    excess = incident.excess(patience)
    lasts = incident.attempted - incident.since
    # from a little before it: after a rollback, the accepted level is passed again
    grows_on = memory.accepted is not None and -_NEAR <= incident.applied - memory.accepted <= cool_down
    if not grows_on and not repeated(incident, memory, last, patience):
        return Verdict.ROLL_BACK
    if excess is None:
        return Verdict.WAIT if lasts < 2 * accept_after else Verdict.ROLL_BACK
    return Verdict.ACCEPT if grows_on or lasts >= accept_after else Verdict.WAIT


def repeated(incident: IncidentLevel, memory: Accepting, last: LastRollback | None, patience: int) -> tuple[Place, ...]:
    """The earlier incidents that this one repeats, see `judge`."""
    at_once = (
        last.number
        if last is not None
        and incident.applied <= last.restored + _NEAR
        and incident.since <= last.attempted + 2 * _NEAR  # some of the steps since then may have been dropped
        else None
    )
    excess = incident.excess(patience)
    return tuple(
        place
        for place in memory.places
        if (place.rollback == at_once or abs(place.applied - incident.applied) <= _NEAR)
        and _same_level(excess, place.excess)
    )


def remember(place: Place, memory: Accepting) -> Accepting:
    """The memory after a rollback that was made for the incident at this place."""
    return memory._replace(places=(*memory.places, place)[-_REMEMBERED:])


def _same_level(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return True
    if one == 0.0 or other == 0.0:  # the loss is not raised: the incident is one of the gradient norm
        return one == other
    return 1 / _SAME_LEVEL <= one / other <= _SAME_LEVEL
