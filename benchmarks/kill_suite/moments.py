"""When a training is killed, and how one waits for that moment."""

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
"""Seconds from the beginning of a write to the kill, at most: about as long as a write takes."""


class TooLate(Exception):
    """The training was over before its moment came."""


@dataclass(frozen=True)
class Moment:
    """When to kill: so long after the start, or so long after a write has begun.

    Args:
        after: seconds.
        write: number of the write, from 1; 0: count from the start of the processes.
    """

    after: float
    write: int = 0

    def earlier(self) -> Moment:
        """For a training that was over too soon."""
        return Moment(self.after, max(1, self.write // 2)) if self.write else Moment(self.after * 0.7)

    def wait(self, checkpoints: Path, is_over: Callable[[], bool]) -> None:
        """Return when it has come.

        Raises:
            TooLate: if the training has ended before.
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
    """Names of the folders that are being written, or whose writer was killed."""
    if not checkpoints.is_dir():
        return set()
    return {name for name in os.listdir(checkpoints) if name.startswith(".writing-")}


def random_moment(generator: random.Random, seconds: float, writes: int, within_write: bool) -> Moment:
    """Any moment of a training.

    Args:
        generator: draws it.
        seconds: that the training takes.
        writes: that it makes.
        within_write: wait for a write, and kill a little later.
    """
    if within_write:
        return Moment(generator.uniform(0, LONGEST_DELAY), generator.randint(1, max(1, writes * 3 // 4)))
    return Moment(generator.uniform(0.0, 0.95) * seconds)


def dealt(choices: Sequence[T], number: int, generator: random.Random) -> list[T]:
    """So many of the choices, each equally often as far as possible, shuffled."""
    hand = [choices[index % len(choices)] for index in range(number)]
    generator.shuffle(hand)
    return hand
