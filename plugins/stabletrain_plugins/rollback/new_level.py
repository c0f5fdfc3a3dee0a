"""Accepts a new level of the loss in a running fit: all rules learn it, and refuted exclusions are undone."""

from __future__ import annotations

import math
import statistics

from stabletrain.core.events import Request
from stabletrain.core.spikes import SpikeState
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.callbacks import RuleCallback
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain_plugins.rollback.acceptance import Accepting, IncidentLevel, LastRollback, Verdict, judge, repeated
from stabletrain_plugins.rollback.incidents import IncidentTracker
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Intervention
from stabletrain_plugins.rollback.rollback_rule import RollbackRule
from stabletrain_plugins.rollback.weight_monitor import WeightProblem


def level_of(
    incidents: IncidentTracker, state: SpikeState, attempted: int, weights: WeightProblem | None
) -> IncidentLevel | None:
    """The level of the present incident; None if it cannot be meant: weights are damaged, or steps are not finite.

    Args:
        incidents: with the present incident.
        state: of the detector.
        attempted: attempted steps so far.
        weights: what is wrong with the weights, if that is why a rollback is requested.
    """
    incident = incidents.current
    if incident is None or state.nonfinite or (weights is not None and weights.damaged):
        return None
    usual, limit = state.loss.past.window, state.loss.limit
    return IncidentLevel(
        since=incident.step,
        applied=incident.applied,
        attempted=attempted,
        losses=incidents.losses,
        centre=usual.median if len(usual) else math.nan,
        margin=0.0 if limit is None else 0.5 * (limit - state.loss.centre),  # as `OutlierTest.is_raised`
        by_speed=weights is not None,
    )


def verdict(rule: RollbackRule, level: IncidentLevel, memory: Accepting, made: tuple[Intervention, ...]) -> Verdict:
    """See `judge`; with ``accept=None`` always a rollback.

    Args:
        rule: the plugin's arguments.
        level: of the present incident.
        memory: of earlier incidents.
        made: the rollbacks of the run, oldest first.
    """
    if rule.accept is None:
        return Verdict.ROLL_BACK
    last, patience = _last(made), rule.patience
    return judge(level, memory, last, accept_after=rule.accept, patience=patience, cool_down=rule.cool_down)


def accepted(
    rule: RollbackRule,
    request: Request,
    level: IncidentLevel,
    memory: Accepting,
    made: tuple[Intervention, ...],
    norms: tuple[float, ...],
    applied: int,
) -> AcceptedLevel:
    """Describe a level that is accepted.

    Args:
        rule: the plugin's arguments.
        request: the request for a rollback that is answered by it.
        level: of the present incident.
        memory: of earlier incidents.
        made: the rollbacks of the run, oldest first.
        norms: the gradient norms of the steps of ``level.losses``.
        applied: applied steps so far.
    """
    refuted = repeated(level, memory, _last(made), rule.patience)
    excluded = [identity for place in refuted for identity in made[place.rollback].excluded]
    return AcceptedLevel(
        step=level.attempted,
        applied=applied,
        given_back=tuple(dict.fromkeys(excluded)),
        losses=level.losses,
        norms=norms,
        rewarm=rule.rewarm // 2,
        level=statistics.median(level.losses),
        was=level.centre,
        cause=f"{request.plugin}: {request.reason}",
    )


def learn(level: AcceptedLevel, guard: StepGuard, loader: TrainLoader) -> None:
    """Let all rules learn an accepted level, and train on the batches again that were excluded because of it."""
    for member in guard.members:
        if isinstance(member, RuleCallback):
            member.state = member.rule.accept_level(member.state, level.losses, level.norms)
    if level.given_back:
        loader.include(level.given_back)


def _last(made: tuple[Intervention, ...]) -> LastRollback | None:
    return LastRollback(made[-1].step, made[-1].applied[1], len(made) - 1) if made else None
