"""What a plugin will do in a run that is planned, for ``dry_run=true``; such a plugin has a method ``planned``."""

from __future__ import annotations

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
    """

    text: str
    host_bytes: int | None = None
    device_bytes: int | None = None


def total(*parts: int | None) -> int | None:
    """The sum of amounts; None: one of them is not known.

    >>> total(1, 2), total(1, None)
    (3, None)
    """
    known = [each for each in parts if each is not None]
    return sum(known) if len(known) == len(parts) else None
