"""What rules say about a step: events for the record, requests for somebody to act on."""

from __future__ import annotations

import json
import math
from enum import IntEnum
from typing import Literal, NamedTuple, TypeAlias

EventKind: TypeAlias = Literal[
    "skip", "nonfinite", "overflow", "spike", "divergence", "regime", "rewarm", "rollback", "stop"
]


class Event(NamedTuple):
    """A record of something that happened at a step.

    Args:
        step: attempted step, from 0.
        plugin: name of the plugin that speaks.
        kind: the class of the event.
        value: the number that caused it, in the unit that ``reason`` names.
        limit: what the number was compared with; NaN if there is no such limit.
        reason: one sentence with the number in it.
    """

    step: int
    plugin: str
    kind: EventKind
    value: float
    limit: float
    reason: str

    def to_json(self) -> str:
        """One line of strict JSON; non-finite numbers become the strings "nan", "inf" and "-inf".

        >>> Event(3, "clip", "skip", float("inf"), 1.0, "norm inf > 1").to_json()
        '{"step": 3, "plugin": "clip", "kind": "skip", "value": "inf", "limit": 1.0, "reason": "norm inf > 1"}'
        """
        record = self._asdict()
        for key in ("value", "limit"):
            if not math.isfinite(record[key]):
                record[key] = str(record[key])
        return json.dumps(record)


class RequestKind(IntEnum):
    """What a rule can ask for, from mild to severe; when several ask, the most severe is executed."""

    REWARM = 1
    ROLLBACK = 2
    STOP = 3


class Request(NamedTuple):
    """A demand that outlives the step: executed when the batch ends, on all ranks alike.

    Where no plugin can roll back, a rollback becomes a clean stop.

    Args:
        kind: what is asked for.
        plugin: name of the plugin that asks.
        reason: one sentence with the number in it.
        steps: length of the second warm-up, in applied steps; None: whatever the one who makes it thinks right.
    """

    kind: RequestKind
    plugin: str
    reason: str
    steps: int | None = None
