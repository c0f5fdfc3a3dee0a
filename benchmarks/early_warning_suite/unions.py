"""Readings that are judged together: one alarm is enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

OWN, FIXED, PUBLISHED = "own history", "fixed limit", "published limit"


class Union(NamedTuple):
    """Readings of which one alarm is enough.

    Args:
        name: in the table.
        readings: their keys.
        by: the judge.
        every: steps between looks; above 1, one value above the limit is enough.
    """

    name: str
    readings: Sequence[str]
    by: str = FIXED
    every: int = 1


_FIVE = ("update", "bound", "entropy", "output", "hidden")
_LOGGED = ("update_most", "bound", "entropy", "output", "rms")

FIVE = Union("five: update, bound, entropy, output logit, hidden state", _FIVE)
FOUR = Union("four, without the update", _FIVE[1:])
LOGGED_FIVE = Union("five as the monitors log them", _LOGGED)
"""Tensor by tensor and module by module, where `FIVE` has the whole model and the last hidden state."""
LOGGED_FOUR = Union("four as the monitors log them, without the update", _LOGGED[1:])
EVERY_10 = Union("five as the monitors log them, a look every 10 steps", _LOGGED, every=10)
EVERY_50 = Union("five as the monitors log them, a look every 50 steps", _LOGGED, every=50)
GRAD_NORM = Union("gradient norm alone", ("grad_norm",))
BOUND_100 = Union("attention bound above 100", ("bound",), PUBLISHED)
RMS_T = Union("RMS_t above 2.3", ("rms_t",), PUBLISHED)
SHARPNESS = Union("sharpness above 1", ("sharpness",), PUBLISHED)
OWN_FIVE = Union("five as the monitors log them", _LOGGED, OWN)

UNIONS = (
    FIVE,
    FOUR,
    LOGGED_FIVE,
    LOGGED_FOUR,
    EVERY_10,
    EVERY_50,
    OWN_FIVE,
    GRAD_NORM,
    BOUND_100,
    RMS_T,
    SHARPNESS,
)
"""The rows of the table."""
