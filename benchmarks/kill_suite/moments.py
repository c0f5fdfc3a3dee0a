"""Times at which a training is killed, and waiting for them."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LONGEST_DELAY = 0.03
"""Maximum time from the beginning of a write to the kill, in seconds: about as long as a write takes."""


class TooLate(Exception):
    """The training ended before the time of the kill."""


@dataclass(frozen=True)
class Moment:
    """The time of a kill, relative to the start of the processes or to the beginning of a write.

    Args:
        after: time after that, in seconds.
        write: number of the write, from 1; 0: relative to the start of the processes.
    """

    after: float
    write: int = 0

    def earlier(self) -> Moment:
        """Return an earlier time, for a training that ended before this one."""
        return Moment(self.after, max(1, self.write // 2)) if self.write else Moment(self.after * 0.7)

    def wait(self, checkpoints: Path, is_over: Callable[[], bool]) -> None:
        """Wait until this time.

        Raises:
            TooLate: if the training ends before.
        """
        began = time.monotonic()
        left_before = writing(checkpoints)
        seen = set(left_before)
        while not is_over():
            if self.write:
                seen |= writing(checkpoints)
                if len(seen) >= len(left_before) + self.write:
                    time.sleep(self.after)
                    return
            elif time.monotonic() - began >= self.after:
                return
            time.sleep(0.001)
        raise TooLate


def writing(checkpoints: Path) -> set[str]:
    """Return the names of folders of incomplete writes: in progress, or of a killed process."""
    if not checkpoints.is_dir():
        return set()
    return {name for name in os.listdir(checkpoints) if name.startswith(".writing-")}


def random_moment(generator: random.Random, seconds: float, writes: int, within_write: bool) -> Moment:
    """Draw the time of a kill during a training.

    Args:
        generator: for drawing it.
        seconds: duration of the training.
        writes: number of checkpoints that it writes.
        within_write: choose a time shortly after a write has begun.
    """
    if within_write:
        return Moment(generator.uniform(0, LONGEST_DELAY), generator.randint(1, max(1, writes * 3 // 4)))
    return Moment(generator.uniform(0.0, 0.95) * seconds)


def evenly_drawn(choices: Sequence[T], number: int, generator: random.Random) -> list[T]:
    """Return ``number`` choices in random order, each equally often as far as possible."""
    drawn = [choices[index % len(choices)] for index in range(number)]
    generator.shuffle(drawn)
    return drawn
