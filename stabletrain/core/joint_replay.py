"""Replay of several rules over recorded signals, joined as the guard joins them, with the rollbacks they ask for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.limits import join
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Rule

_UNHEALTHY_COSTS = 5
"""Healthy steps that an unhealthy one costs a snapshot that is not trusted yet."""


class JointStep(NamedTuple):
    """One step of a `replay_together`.

    Args:
        outcome: of the step.
        events: of all rules, in their order.
        request: the most severe request of the step; None: there is none.
        back_to: attempted steps before the snapshot to which the rules went back; None: they did not.
        accepted: whether the rules learned the level of the loss, which came again after going back.
        ends: why the run would have been stopped after this step; empty: it would go on.
    """

    outcome: Outcome
    events: tuple[Event, ...]
    request: Request | None = None
    back_to: int | None = None
    accepted: bool = False
    ends: str = ""


class Snapshots(NamedTuple):
    """When the states of the rules are kept, and which of them are gone back to.

    Args:
        every: applied steps from one snapshot to the next, >= 1.
        keep: snapshots that are kept, >= 2.
        trust_after: healthy steps after which a snapshot is trusted.
        max_rollbacks: rollbacks of a run; one more request ends it.
        cool_down: attempted steps after a rollback within which another request is for the same cause.
        accept: whether a level of the loss that comes again after going back is accepted; None: it is not.
    """

    every: int
    keep: int
    trust_after: int
    max_rollbacks: int
    cool_down: int
    accept: int | None


class _Kept(NamedTuple):
    step: int
    states: tuple[Any, ...]
    healthy: int = 0
    trusted: bool = False


def replay_together(
    rules: Sequence[Rule[Any]], series: Iterable[tuple[float, float]], snapshots: Snapshots | None = None
) -> Iterator[JointStep]:
    """Decide each step by the limits of all rules; a requested rollback takes their states back, not the series.

    What a run would have recorded after a rollback, or with other steps dropped, is not known: the recorded steps
    follow. So a level that lasts is one that came again: it is accepted at the second request. Healthy, for a snapshot,
    is an applied step without an event.

    Args:
        rules: the rules.
        series: pairs of loss and raw gradient norm, one for each attempted step.
        snapshots: of the plugin that rolls back; None: there is none, and a request for it ends the run.

    Yields:
        The steps, up to the one that ends the run.
    """
    states = [rule.init() for rule in rules]
    kept: list[_Kept] = []
    changes = {length.value for rule in rules for length in rule.expected_changes() if length.unit == "steps"}
    since: list[tuple[float, float]] = []  # signals since the last rollback
    applied = rollbacks = 0
    for step, (loss, norm) in enumerate(series):
        if applied in changes:
            states = [rule.forget(state) for rule, state in zip(rules, states, strict=True)]
        limits = join(rule.limits(state) for rule, state in zip(rules, states, strict=True))
        skipped = limits.skips_step(loss, norm)
        applied += not skipped
        outcome = Outcome(step, loss, norm, norm, math.nan if skipped else limits.clip(norm), skipped=skipped)
        observed = [rule.observe(state, outcome) for rule, state in zip(rules, states, strict=True)]
        states = [each.state for each in observed]
        events = tuple(event for each in observed for event in each.events)
        request = max((one for each in observed for one in each.requests), key=lambda one: one.kind, default=None)
        healthy = not skipped and not events and math.isfinite(loss) and math.isfinite(norm)
        since.append((loss, norm))
        if snapshots is not None:
            kept = [_after(each, healthy, snapshots.trust_after) for each in kept]
        if request is None or request.kind is RequestKind.REWARM:
            if snapshots is not None and healthy and _is_due(kept, applied, snapshots.every):
                kept = [*kept, _Kept(step + 1, tuple(states))][-snapshots.keep :]
            yield JointStep(outcome, events, request)
            continue
        if snapshots is not None and rollbacks and _came_again(since, request, snapshots):
            losses, norms = zip(*since, strict=True)
            states = [rule.accept_level(state, losses, norms) for rule, state in zip(rules, states, strict=True)]
            yield JointStep(outcome, events, request, accepted=True)
            continue
        target = next((each for each in reversed(kept) if each.trusted), kept[0] if kept else None)
        ends = _end(request, snapshots, rollbacks, target)
        if ends or target is None:
            yield JointStep(outcome, events, request, ends=ends)
            return
        rollbacks += 1
        since = []
        states = [rule.rebase(state, request.reason) for rule, state in zip(rules, target.states, strict=True)]
        kept = kept[: kept.index(target) + 1]
        yield JointStep(outcome, events, request, back_to=target.step)


def _after(kept: _Kept, healthy: bool, trust_after: int) -> _Kept:
    count = max(0, kept.healthy + (1 if healthy else -_UNHEALTHY_COSTS))
    return kept if kept.trusted else kept._replace(healthy=count, trusted=count >= trust_after)


def _is_due(kept: Sequence[_Kept], applied: int, every: int) -> bool:
    return not kept or applied % every == 0


def _came_again(since: Sequence[tuple[float, float]], request: Request, snapshots: Snapshots) -> bool:
    finite = all(math.isfinite(loss) and math.isfinite(norm) for loss, norm in since)
    soon = len(since) <= snapshots.cool_down and snapshots.accept is not None
    return finite and soon and request.kind is RequestKind.ROLLBACK


def _end(request: Request, snapshots: Snapshots | None, rollbacks: int, target: _Kept | None) -> str:
    """Why a request ends the run; empty: it is executed."""
    if request.kind is RequestKind.STOP:
        return request.reason
    if snapshots is None:
        return f"no plugin rolls back; {request.reason}"
    if rollbacks >= snapshots.max_rollbacks:
        return f"{rollbacks} rollbacks did not help; {request.reason}"
    return "" if target is not None else f"there is no snapshot yet; {request.reason}"
