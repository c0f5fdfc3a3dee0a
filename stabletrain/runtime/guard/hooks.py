"""Hooks that any callback, module or data module may define, without a base class of stabletrain.

They are found by name, so a misspelt one would never be called. Before training starts, `check_hooks` reports hooks
with other arguments, one hook of a pair without the other, and names that are similar to a hook's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Protocol, TypeGuard, runtime_checkable

from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.errors import UserError
from stabletrain.runtime.records.event_log import logger


class EventListener(Protocol):
    """A callback that receives every event, at the step at which it happened."""

    def on_stability_event(self, trainer: Trainer, module: LightningModule, event: Event) -> None:
        """Called on every rank for each event, after it was written to the event log."""


@runtime_checkable
class RequestHandler(Protocol):
    """A callback that executes requests of rules; the first in the list that handles the request's kind is called."""

    handles: frozenset[RequestKind]

    def handle_request(self, trainer: Trainer, module: LightningModule, request: Request) -> None:
        """Execute a request of a kind in ``handles``; called on all ranks, at the end of a batch."""


@runtime_checkable
class HasOwnState(Protocol):
    """A callback, LightningModule or LightningDataModule whose state a snapshot does not find by itself.

    A snapshot finds parameters, buffers, metrics, optimizers, schedulers, the loss scaler, models that a callback
    averages, early stopping, plugins and random generators. Other state that training changes, such as a list in a
    callback, is part of a snapshot if its owner defines these two methods. Both are called in ``on_train_batch_end``,
    on every rank, between two optimizer steps, and neither may call a collective.

    Example::

        class CountBatches(Callback):
            def __init__(self):
                self.count = 0

            def on_train_batch_end(self, *args):
                self.count += 1

            def snapshot_state(self):
                return {"count": self.count}

            def restore_state(self, state):
                self.count = state["count"]
    """

    def snapshot_state(self) -> Any:
        """Return the state. It is deep-copied, so the live object may be returned."""

    def restore_state(self, state: Any) -> None:
        """Restore a state.

        Args:
            state: a deep copy of what ``snapshot_state`` returned; a snapshot may be restored several times.
        """


_ARGUMENTS = {
    hook: tuple(inspect.signature(method).parameters)[1:]  # without self
    for protocol in (EventListener, RequestHandler, HasOwnState)
    for hook, method in vars(protocol).items()
    if inspect.isfunction(method) and not hook.startswith("_")
}
"""The hooks, and the names of their arguments."""
_NEARLY = 0.9
"""Similarity of names (ratio of `difflib`) from which on one is reported as a misspelling of the other."""


def check_hooks(owners: Iterable[Any]) -> None:
    """Raise an error for hooks that would fail when they are called, or would never be called.

    In a class that is not a plugin, only ``on_stability_event`` is certainly meant for stabletrain. For the other hooks
    a warning is logged there, and similar names are ignored.

    Args:
        owners: callbacks, module and data module of a Trainer; None is skipped.

    Raises:
        UserError: names the class, the hook, and its expected arguments.

    >>> from lightning.pytorch import Callback
    >>> class Listener(Callback):
    ...     def on_stability_event(self, event): ...
    >>> check_hooks([Listener()])
    Traceback (most recent call last):
    ...
    stabletrain.errors.UserError: Listener.on_stability_event takes (event); expected (trainer, module, event)
    """
    for owner in owners:
        if owner is None:
            continue
        is_plugin = isinstance(getattr(owner, "plugin", None), str)
        for hook in _ARGUMENTS:
            problem = _problem(owner, hook) or (_misspelling(owner, hook) if is_plugin else None)
            if problem and (is_plugin or hook == "on_stability_event"):
                raise UserError(problem)
            if problem:
                logger.warning("%s; stabletrain does not call it", problem)


def has_own_state(owner: Any) -> TypeGuard[HasOwnState]:
    """Whether an object has both hooks of `HasOwnState`, with its arguments."""
    return isinstance(owner, HasOwnState) and not any(_problem(owner, h) for h in ("snapshot_state", "restore_state"))


def _problem(owner: Any, hook: str) -> str | None:
    """What is wrong with a hook of an object; None if the hook is correct or missing."""
    method = getattr(owner, hook, None)
    if not callable(method):
        return None
    name = type(owner).__name__
    if hook == "handle_request" and not isinstance(owner, RequestHandler):
        return f"{name} has handle_request but no attribute handles: expected the set of RequestKind that it executes"
    if hook == "snapshot_state" and not isinstance(owner, HasOwnState):
        return f"{name} has snapshot_state but no restore_state"
    try:
        signature = inspect.signature(method)
        signature.bind(*_ARGUMENTS[hook])
    except ValueError:  # a builtin has no signature to read
        return None
    except TypeError:
        takes = ", ".join(signature.parameters)
        return f"{name}.{hook} takes ({takes}); expected ({', '.join(_ARGUMENTS[hook])})"
    return None


def _misspelling(owner: Any, hook: str) -> str | None:
    if callable(getattr(owner, hook, None)):
        return None
    near = get_close_matches(hook, dir(type(owner)), 1, _NEARLY)
    return f"{type(owner).__name__} has {near[0]!r}; did you mean {hook!r}?" if near else None
