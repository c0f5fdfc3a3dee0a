"""Output of the rules for one step: events, which are logged, and requests, which change the run."""

from __future__ import annotations

import json
import math
from enum import IntEnum
from typing import Literal, NamedTuple, TypeAlias

EventKind: TypeAlias = Literal[
    "skip",
    "nonfinite",
    "overflow",
    "spike",
    "divergence",
    "regime",
    "announced",
    "not_learning",
    "overfitting",
    "warning",
    "rewarm",
    "rollback",
    "accept",
    "replicas_differ",
    "stop",
]


class Event(NamedTuple):
    """A record of something that happened at a step.

    Args:
        step: attempted step, from 0.
        plugin: name of the plugin that reports it.
        kind: type of the event.
        value: the number that caused it; ``reason`` names the signal.
        limit: the limit that the number was compared with; NaN if there is none.
        reason: one sentence that contains the number.
        samples: of a dropped step: the indices of its samples on all ranks, where the train loader knows them.
        more_samples: how many others the step had.
        optimizer: the name of the optimizer whose step it is, if the module has several.
    """

    step: int
    plugin: str
    kind: EventKind
    value: float
    limit: float
    reason: str
    samples: tuple[int | str, ...] = ()
    more_samples: int = 0
    optimizer: str = ""

    def to_json(self) -> str:
        """The event as one line of strict JSON.

        Non-finite numbers become the strings "nan", "inf" and "-inf"; ``samples``, ``more_samples`` and
        ``optimizer`` are left out if there are none.

        >>> Event(3, "clip", "skip", float("inf"), 1.0, "norm inf > 1").to_json()
        '{"step": 3, "plugin": "clip", "kind": "skip", "value": "inf", "limit": 1.0, "reason": "norm inf > 1"}'
        """
        record = self._asdict()
        for key in ("samples", "more_samples", "optimizer"):
            if not record[key]:
                del record[key]
        for key in ("value", "limit"):
            if not math.isfinite(record[key]):
                record[key] = str(record[key])
        return json.dumps(record)


class RequestKind(IntEnum):
    """Actions that a rule can request, in order of severity; of several requests the most severe is executed."""

    REWARM = 1
    ROLLBACK = 2
    STOP = 3


class Request(NamedTuple):
    """A requested action, executed at the end of the batch on all ranks.

    If no plugin can roll back, a requested rollback becomes a clean stop.

    Args:
        kind: the action.
        plugin: name of the plugin that requests it.
        reason: one sentence that contains the number.
        steps: for a rewarm, length of the second warm-up in applied steps, >= 0; 0: end an earlier one.
        good_at: for a rollback that neither the data nor the learning rate has caused, such as a flipped bit: attempted
            steps at the last check that found the state good. No later state is restored, and the same steps are made
            again: no batch is excluded, no warm-up follows, and the rules' histories are those of the restored state.
    """

    kind: RequestKind
    plugin: str
    reason: str
    steps: int = 100
    good_at: int | None = None
