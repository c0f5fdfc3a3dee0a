"""When a checkpoint is due: at intervals of steps, epochs, tokens, percent of the run, or time.

See `stabletrain.core.lengths` for the family of parsers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from stabletrain.core import lengths
from stabletrain.core.lengths import Length, LengthLike, RunLength, number_and_unit
from stabletrain.errors import UserError

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
FORMS = f"{lengths.FORMS}, or a time: '30s', '10min', '2h', '1d'"
"""The forms of an interval, for messages."""


def parse(value: LengthLike, *, name: str = "interval") -> Length | float:
    """Read an interval; return a length, or a time in seconds.

    Args:
        value: a length (`500`, `"3ep"`, `"1e9tok"`, `"2%"`) or a time (`"30s"`, `"10min"`, `"2h"`, `"1d"`), above 0.
        name: the config key, for messages.

    Raises:
        UserError: if the value has no such form, or is zero.

    >>> parse("10min"), parse("3ep")
    (600.0, Length(value=3, unit='epochs'))
    """
    found = number_and_unit(value, _SECONDS) if isinstance(value, str) else None
    interval: Length | float
    if found is not None and math.isfinite(found[0]):
        interval = amount = float(Fraction(str(found[0])) * _SECONDS[found[1]])
    else:
        try:
            interval = Length.parse(value, name=name)
        except UserError:
            raise UserError(f"{name}: expected {FORMS}, got {value!r}") from None
        amount = interval.value
    if not amount > 0:
        raise UserError(f"{name}: expected an interval above 0, got {value!r}; null means no interval")
    return interval


def seconds(value: int | float | str, *, name: str = "time") -> float:
    """Read a time that is nothing else: seconds as a number, or text with a unit.

    Args:
        value: `300`, `"300"`, `"30s"`, `"5min"`, `"2h"`, `"1d"`, above 0.
        name: the config key, for messages.

    Raises:
        UserError: if the value has no such form, or is zero.

    >>> seconds(300), seconds("5min")
    (300.0, 300.0)
    """
    found = number_and_unit(value, {**_SECONDS, "": 1}) if isinstance(value, str) else (value, "")
    if found is None or not math.isfinite(found[0]):
        raise UserError(f"{name}: expected seconds, or a time such as '30s', '5min', '2h' or '1d', got {value!r}")
    result = float(Fraction(str(found[0])) * {**_SECONDS, "": 1}[found[1]])
    if not result > 0:
        raise UserError(f"{name}: expected a time above 0, got {value!r}")
    return result


class SaveTriggers:
    """One or several intervals; a checkpoint is due when any of them has passed.

    Lengths count applied steps from the start of the run, so that `500` means steps 500, 1000, 1500, also after a
    resume. A time counts from the last checkpoint.

    Args:
        every: an interval, or several; None: never.
        name: the config key, for messages.

    Raises:
        UserError: if a value is neither a length nor a time, or zero.

    >>> triggers = SaveTriggers([500, "10min"])
    >>> triggers.start(RunLength(), step=0, now=0.0)
    >>> triggers.due(step=1, now=599.0), triggers.due(step=1, now=600.0), triggers.due(step=500, now=1.0)
    (False, True, True)
    """

    def __init__(self, every: LengthLike | Sequence[LengthLike] | None, name: str = "every") -> None:
        given: list[LengthLike] = []
        if isinstance(every, Sequence) and not isinstance(every, str):
            given = list(every)
        elif every is not None:
            given = [every]
        intervals = [parse(each, name=name) for each in given]
        self._name = name
        self._lengths = [each for each in intervals if isinstance(each, Length)]
        self.seconds = min((each for each in intervals if not isinstance(each, Length)), default=None)
        self._steps: list[int] = []
        self._step = 0
        self._saved_at = 0.0

    def start(self, run: RunLength, step: int, now: float) -> None:
        """Start the intervals, at the start of a run or at a resume.

        Args:
            run: what is known of the run's length.
            step: applied steps so far.
            now: a monotonic clock, seconds.

        Raises:
            UserError: if a length cannot be turned into steps.
        """
        self._steps = [length.resolve(run, name=self._name) for length in self._lengths]
        self._step, self._saved_at = step, now

    def due(self, step: int, now: float) -> bool:
        """Return whether a checkpoint is due; a length makes one due only once at the same step.

        Args:
            step: applied steps so far.
            now: the clock of `start`.
        """
        moved, self._step = step != self._step, step
        by_step = moved and any(step % steps == 0 for steps in self._steps)
        return by_step or (self.seconds is not None and now - self._saved_at >= self.seconds)

    def saved(self, now: float) -> None:
        """Restart the clock, after a checkpoint was saved or could not be written.

        Args:
            now: the clock of `start`.
        """
        self._saved_at = now
