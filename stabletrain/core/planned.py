"""What a plugin will do in a run that is planned, for ``dry_run=true``; such a plugin has a method ``planned``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stabletrain.core.lengths import RunLength


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is known of the run when plugins are asked.

    Args:
        state: bytes of one rank's parameters, buffers and optimizer state; None: not known.
        batch: bytes of a micro-batch of one rank; None: not known.
        micro_batches: in an optimizer step.
        length: of the run.
    """

    state: int | None
    batch: int | None
    micro_batches: int
    length: RunLength


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a plugin will do.

    Args:
        text: what and when, in one sentence without a full stop.
        host_bytes: main memory that it will hold on each rank; None: it holds none that is worth mentioning.
        device_bytes: memory of the device, besides that of a step; None: as above.
        curve: of a schedule, the learning rate as a share of the base rate, at steps that are evenly distributed over
            the run, the first and the last among them; empty: it sets no rate, or the length of the run is not known.
    """

    text: str
    host_bytes: int | None = None
    device_bytes: int | None = None
    curve: tuple[float, ...] = ()


POINTS = 60
"""Of a schedule's curve in a plan."""


def sampled(factor: Callable[[int], float], steps: int) -> tuple[float, ...]:
    """A curve at `POINTS` steps of a run, or at every step of a shorter one.

    Args:
        factor: by the index of the step.
        steps: of the run, at least 1.

    >>> sampled(lambda step: step / 2, 3)
    (0.0, 0.5, 1.0)
    """
    count = min(steps, POINTS)
    last = max(count - 1, 1)
    return tuple(factor(round(i * (steps - 1) / last)) for i in range(count))


def total(*parts: int | None) -> int | None:
    """The sum of amounts; None: one of them is not known.

    >>> total(1, 2), total(1, None)
    (3, None)
    """
    known = [each for each in parts if each is not None]
    return sum(known) if len(known) == len(parts) else None
