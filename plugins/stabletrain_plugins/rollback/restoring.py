"""Carries out an intervention: excludes its batches, restores its state, and resets the baselines if requested."""

from __future__ import annotations

from stabletrain.errors import UserError
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.callbacks import RuleCallback
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain.runtime.snapshots.state_tree import SnapshotError
from stabletrain_plugins.rollback import older_checkpoint
from stabletrain_plugins.rollback.intervention import Intervention


def restore(intervention: Intervention, snapshot: Snapshot | None, guard: StepGuard, loader: TrainLoader) -> None:
    """Put a run into the state after an intervention; call it on all ranks, in ``on_train_batch_end``.

    Args:
        intervention: decided now, or read from a log.
        snapshot: the snapshot to restore; None: the intervention's checkpoint is read from disk.
        guard: of the run.
        loader: of the run.

    Raises:
        SnapshotError: if model or optimizer are no longer those of the snapshot.
        UserError: if the checkpoint is not of the step that the intervention says, or the data position that was
            restored is out of reach.
    """
    if intervention.excluded:
        loader.exclude(intervention.excluded)
    if snapshot is not None:
        _restore_snapshot(snapshot, intervention, guard, loader)
    else:
        _restore_checkpoint(intervention, guard)
    if intervention.baselines == "reset":
        for member in guard.members:
            if isinstance(member, RuleCallback):
                member.states = [member.rule.init() for _ in member.states]


def _restore_snapshot(snapshot: Snapshot, intervention: Intervention, guard: StepGuard, loader: TrainLoader) -> None:
    if intervention.rewound and not snapshot.can_rewind(loader):
        raise UserError(
            f"rollback: the log restores the data position of step {intervention.to}, and the train loader was "
            "replaced since. Replay with the data and the trainer of the log (config key plugins.spike.replay)"
        )
    cause = None if intervention.repeats else intervention.cause
    try:
        snapshot.restore(guard, loader, cause, rewind=intervention.rewound)
    except SnapshotError as error:
        raise SnapshotError(f"rollback: {error}, or train without rollbacks (plugins/spike=detect)") from error


def _restore_checkpoint(intervention: Intervention, guard: StepGuard) -> None:
    assert intervention.checkpoint is not None, "an intervention without a snapshot has a checkpoint"
    older_checkpoint.restore(guard, intervention.checkpoint, intervention.cause)
    expected, found = intervention.applied[1], guard.trainer.global_step
    if found != expected:
        raise UserError(
            f"rollback: expected {intervention.checkpoint} to be of step {expected}, as when the log was written, got "
            f"step {found}: the file was replaced. Replay with the original checkpoint (config key "
            "plugins.spike.replay)"
        )
