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


_FIVE = ("update", "bound", "entropy", "output", "rms")

FIVE = Union("five: update, attention bound, entropy, output logit, activation RMS", _FIVE)
FOUR = Union("four, without the update", _FIVE[1:])
EVERY_10 = Union("the five, a look every 10 steps", _FIVE, every=10)
EVERY_50 = Union("the five, a look every 50 steps", _FIVE, every=50)
OWN_FIVE = Union("the five", _FIVE, OWN)
OWN_FOUR = Union("the four", _FIVE[1:], OWN)
LOSS_RISE = Union("rise of the 10-step loss alone", ("loss_rise",))
GRAD_NORM = Union("gradient norm alone", ("grad_norm",))
BOUND_100 = Union("attention bound above 100", ("bound",), PUBLISHED)
RMS_T = Union("RMS_t above 2.3", ("rms_t",), PUBLISHED)
SHARPNESS = Union("sharpness above 1", ("sharpness",), PUBLISHED)

UNIONS = (FIVE, FOUR, EVERY_10, EVERY_50, OWN_FIVE, OWN_FOUR, LOSS_RISE, GRAD_NORM, BOUND_100, RMS_T, SHARPNESS)
"""The rows of the table."""
