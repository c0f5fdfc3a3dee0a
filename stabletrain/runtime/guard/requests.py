"""Execution of the rules' requests, at the end of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.runtime.guard.hooks import RequestHandler
from stabletrain.runtime.stop import TrainingStopped
from stabletrain.settings import worded


def dispatch(request: Request, trainer: Trainer, module: LightningModule) -> bool:
    """Pass a request to the first callback that handles its kind; return whether there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RequestHandler) and request.kind in callback.handles:
            callback.handle_request(trainer, module, request)
            return True
    return False


def can_handle(trainer: Trainer, kind: RequestKind) -> bool:
    """Whether a callback executes requests of this kind."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(each, RequestHandler) and kind in each.handles for each in callbacks)


def execute(
    requests: Sequence[Request],
    trainer: Trainer,
    module: LightningModule,
    report: Callable[[Event], None],
    rewarm: Callable[[Request], None],
    step: int,
) -> None:
    """Execute the most severe request; a rollback that no callback can make becomes a stop.

    Of several rollbacks, one for damage that the data has not caused comes first: it undoes what the others saw.

    The requests come from outcomes that are the same on all ranks, so all ranks execute the same one.

    Args:
        requests: at least one.
        trainer: in a fit.
        module: the module that is trained.
        report: called with the event of a stop.
        rewarm: lets the learning rate climb again, as a request says.
        step: the last attempted step, for the event.

    Raises:
        TrainingStopped: if the run is to end.
    """
    request = max(requests, key=lambda each: (each.kind, each.good_at is not None))
    if request.kind is RequestKind.REWARM:
        rewarm(request)
        return
    if dispatch(request, trainer, module):
        return
    report(Event(step, request.plugin, "stop", math.nan, math.nan, request.reason))
    raise TrainingStopped(request.plugin, worded(request.reason))
