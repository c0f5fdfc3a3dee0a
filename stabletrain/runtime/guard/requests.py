"""Executing what rules asked for, when the batch is over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.stop import TrainingStopped

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from stabletrain.runtime.guard.step_guard import StepGuard


@runtime_checkable
class RequestHandler(Protocol):
    """A callback that can execute requests: found in ``trainer.callbacks``, needs no registration."""

    handles: frozenset[RequestKind]

    def handle_request(self, trainer: Trainer, module: LightningModule, request: Request) -> None:
        """Execute a request of a kind in ``handles``; called on all ranks, at the end of a batch."""


def hand_over(request: Request, guard: StepGuard) -> bool:
    """Give a request to the first callback that handles its kind; returns whether there is one."""
    for callback in guard.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RequestHandler) and request.kind in callback.handles:
            callback.handle_request(guard.trainer, guard.module, request)
            return True
    return False


def execute(requests: Sequence[Request], guard: StepGuard) -> None:
    """Execute the most severe request; a rollback that nobody can make is a stop.

    The requests come from outcomes that are the same on all ranks, so all ranks execute the same one.

    Raises:
        TrainingStopped: if the run is to end.
    """
    request = max(requests, key=lambda each: each.kind)
    if hand_over(request, guard):
        return
    if request.kind is RequestKind.REWARM:
        logger.warning("%s asks to re-warm the learning rate (%s), but no schedule can", request.plugin, request.reason)
        return
    step = guard.counters.attempted - 1
    guard.report(Event(step, request.plugin, "stop", math.nan, math.nan, request.reason))
    raise TrainingStopped(request.plugin, request.reason)
