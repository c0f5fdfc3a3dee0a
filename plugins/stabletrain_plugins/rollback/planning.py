"""Turns a rollback request into a complete `Intervention`: which state is restored, which batches are excluded."""

from __future__ import annotations

from typing import NamedTuple

from stabletrain.core.events import Request
from stabletrain.runtime.data.tape import TapedBatch
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain_plugins.rollback import older_checkpoint
from stabletrain_plugins.rollback.decision import GiveUp, Situation, SnapshotInfo, ToCheckpoint, decide
from stabletrain_plugins.rollback.exclusion import batches_to_exclude
from stabletrain_plugins.rollback.incidents import IncidentTracker
from stabletrain_plugins.rollback.intervention import Intervention
from stabletrain_plugins.rollback.older_checkpoint import FoundCheckpoint
from stabletrain_plugins.rollback.rollback_rule import RollbackRule
from stabletrain_plugins.rollback.snapshot_ring import RingEntry, SnapshotRing


class Plan(NamedTuple):
    """A rollback that has been decided and not made yet.

    Args:
        intervention: its description.
        snapshot: the snapshot to restore; None: the intervention's checkpoint is restored.
    """

    intervention: Intervention
    snapshot: Snapshot | None


def plan_rollback(
    rule: RollbackRule,
    request: Request,
    made: tuple[Intervention, ...],
    guard: StepGuard,
    loader: TrainLoader,
    ring: SnapshotRing,
    incidents: IncidentTracker,
    damaged_after: int | None = None,
) -> Plan | GiveUp:
    """Decide on a rollback, see `decide`, and find its checkpoint and batches. A collective.

    Args:
        rule: the plugin's arguments.
        request: the request for the rollback.
        made: all rollbacks of the run, oldest first.
        guard: of the run, settled.
        loader: of the run.
        ring: the snapshots.
        incidents: with the current incident.
        damaged_after: see `Situation`.
    """
    trainer, incident = guard.trainer, incidents.current
    situation = Situation(
        attempted=guard.counters.attempted,
        applied=trainer.global_step,
        made=made,
        incident=None if incident is None else incident.applied,
        trusted=tuple(_info(each) for each in ring if each.trusted),
        untrusted=tuple(_info(each) for each in ring if not each.trusted),
        damaged_after=damaged_after,
    )
    decision = decide(rule, situation, request.reason)
    if isinstance(decision, ToCheckpoint):
        checkpoint = older_checkpoint.find(trainer, decision.before)
        if checkpoint is not None:
            batches = batches_to_exclude(decision.exclusion, incidents, loader, None, guard.window.size)
            return Plan(_intervention(rule, request, situation, checkpoint, batches, guard, rewound=False), None)
        decision = decision.otherwise
    if isinstance(decision, GiveUp):
        return decision
    step = decision.step
    snapshot = next(each.snapshot for each in ring if each.snapshot.step == step)
    # by the bytes of its own batches, the tape of one rank may not reach as far back as that of another
    mark = None if guard.ranks.any(not snapshot.can_rewind(loader)) else snapshot.mark
    batches = batches_to_exclude(decision.exclusion, incidents, loader, mark, guard.window.size)
    return Plan(_intervention(rule, request, situation, snapshot, batches, guard, rewound=mark is not None), snapshot)


def plan_repetition(request: Request, guard: StepGuard, loader: TrainLoader, ring: SnapshotRing) -> Plan | GiveUp:
    """Decide on a rollback for damage that the data has not caused: the newest snapshot from before it. A collective.

    A snapshot need not be trusted for that: trust is about the loss after it.

    Args:
        request: with ``good_at``.
        guard: of the run, settled.
        loader: of the run.
        ring: the snapshots.
    """
    assert request.good_at is not None
    good = [each.snapshot for each in ring if each.snapshot.step <= request.good_at]
    if not good:
        return GiveUp(f"there is no snapshot from before the damage; {request.reason}")
    snapshot = good[-1]
    rewound = not guard.ranks.any(not snapshot.can_rewind(loader))
    made = Intervention(
        step=guard.counters.attempted,
        to=snapshot.step,
        checkpoint=None,
        applied=(guard.trainer.global_step, snapshot.applied),
        excluded=(),
        samples=(),
        rewarm=0,
        baselines="restore",
        plugin=request.plugin,
        cause=request.reason,
        rewound=rewound,
        repeats=True,
    )
    return Plan(made, snapshot)


def _info(entry: RingEntry) -> SnapshotInfo:
    return SnapshotInfo(entry.snapshot.step, entry.snapshot.applied)


def _intervention(
    rule: RollbackRule,
    request: Request,
    situation: Situation,
    restored: Snapshot | FoundCheckpoint,
    batches: list[TapedBatch],
    guard: StepGuard,
    rewound: bool,
) -> Intervention:
    several = guard.ranks.size > 1  # then the ranks have different samples at the same position
    excluded = tuple(each.position_key if several else each.identity for each in batches)
    return Intervention(
        step=situation.attempted,
        to=restored.step if isinstance(restored, Snapshot) else None,
        checkpoint=restored.path if isinstance(restored, FoundCheckpoint) else None,
        applied=(situation.applied, restored.applied),
        excluded=guard.ranks.gather(excluded)[0],  # the same on all: their tapes may reach back differently
        samples=tuple(each.identity for each in batches) if several else (),
        rewarm=rule.rewarm,
        baselines=rule.baselines,
        plugin=request.plugin,
        cause=request.reason,
        rewound=rewound,
    )
