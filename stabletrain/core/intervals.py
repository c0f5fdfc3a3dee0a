"""When a checkpoint is due: by steps, epochs, tokens or a share of the run, and by time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from stabletrain.core.lengths import Length, LengthLike, RunLength
from stabletrain.errors import UserError

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*")
_TIMES = "or a time: '30s', '10min', '2h', '1d'"


class SaveTriggers:
    """One or several intervals; a checkpoint is due when any of them is over.

    Lengths count applied steps from the start of the run, so that `500` means steps 500, 1000, 1500, also after a
    resume. A time counts from the last checkpoint.

    Args:
        every: a length or a time, or several; None: never.
        name: the config key, for messages.

    Raises:
        UserError: if one is neither a length nor a time, or zero.

    >>> intervals = SaveTriggers([500, "10min"])
    >>> intervals.start(RunLength(), step=0, now=0.0)
    >>> intervals.due(step=1, now=599.0), intervals.due(step=1, now=600.0), intervals.due(step=500, now=1.0)
    (False, True, True)
    """

    def __init__(self, every: LengthLike | Sequence[LengthLike] | None, name: str = "every") -> None:
        self.seconds: float | None = None
        self._name = name
        self._lengths: list[Length] = []
        self._steps: list[int] = []
        self._step = 0
        self._saved_at = 0.0
        given = [every] if isinstance(every, int | str) else list(every or [])
        for each in given:
            seconds = _seconds(each)
            if seconds is None:
                self._lengths.append(self._length(each))
            elif seconds > 0:
                self.seconds = min(seconds, self.seconds or seconds)
            else:
                raise UserError(f"{name}: an interval must be above 0, got {each!r}")

    def start(self, run: RunLength, step: int, now: float) -> None:
        """The run begins, or goes on.

        Args:
            run: what is known of its length.
            step: applied steps so far.
            now: a monotonic clock, seconds.

        Raises:
            UserError: if a length cannot be turned into steps.
        """
        self._steps = [length.resolve(run, name=self._name) for length in self._lengths]
        self._step, self._saved_at = step, now

    def due(self, step: int, now: float) -> bool:
        """Whether a checkpoint is due; the same step is due once.

        Args:
            step: applied steps so far.
            now: the clock of `start`.
        """
        moved, self._step = step != self._step, step
        by_step = moved and any(step % steps == 0 for steps in self._steps)
        return by_step or (self.seconds is not None and now - self._saved_at >= self.seconds)

    def saved(self, now: float) -> None:
        """A checkpoint was made, or tried."""
        self._saved_at = now

    def _length(self, value: LengthLike) -> Length:
        try:
            length = Length.parse(value, name=self._name)
        except UserError as error:
            raise UserError(f"{error}; {_TIMES}") from None
        if not length.value:
            raise UserError(f"{self._name}: an interval must be above 0, got {value!r}; null switches it off")
        return length


def _seconds(value: LengthLike) -> float | None:
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    return float(Fraction(match[1]) * _SECONDS[match[2]]) if match else None
