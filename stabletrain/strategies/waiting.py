"""How long the processes of a strategy of ours wait for each other."""

from __future__ import annotations

import math
from datetime import timedelta

from stabletrain.errors import is_number, require

_DEFAULT = timedelta(minutes=5)


def waiting_limit(timeout: float | timedelta | None, owner: str, key: str = "strategy") -> timedelta:
    """The time after which a collective that not all processes call fails.

    Args:
        timeout: seconds, or a timedelta, > 0; None: 5 minutes.
        owner: class of the strategy, for messages.
        key: the config node of its arguments, for messages.

    Raises:
        UserError: if it is none of these.

    >>> waiting_limit(2.5, "FSDP2Strategy")
    datetime.timedelta(seconds=2, microseconds=500000)
    """
    if timeout is None:
        return _DEFAULT
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    valid = is_number(seconds) and 0 < seconds < math.inf
    require(valid, owner, "timeout", "seconds > 0, or None", timeout, key, owner)
    return timedelta(seconds=seconds)
