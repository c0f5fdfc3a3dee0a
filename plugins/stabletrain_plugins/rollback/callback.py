"""Restore a healthy snapshot when training diverges, exclude the offending batches, and continue."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.metric_names import MetricInfo
from stabletrain.core.outcome import Outcome
from stabletrain.core.planned import Planned, Sizes
from stabletrain.core.spikes import SPIKE_SCORE
from stabletrain.errors import UserError
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.callbacks import RuleCallback
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.records import diagnosis, run_files
from stabletrain.runtime.snapshots.overlap import Overlap
from stabletrain.runtime.snapshots.snapshot import Snapshot, check_state
from stabletrain.runtime.snapshots.state_tree import SnapshotError
from stabletrain.runtime.stop import TrainingStopped
from stabletrain.settings import worded
from stabletrain_plugins.rollback import acceptance, memory, new_level, restoring
from stabletrain_plugins.rollback.acceptance import Accepting, Place, Verdict
from stabletrain_plugins.rollback.checkpoint_state import RollbackState
from stabletrain_plugins.rollback.decision import GiveUp
from stabletrain_plugins.rollback.incidents import IncidentState, IncidentTracker, is_healthy
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Identity, Intervention, excluded_batches
from stabletrain_plugins.rollback.intervention_log import InterventionLog, read
from stabletrain_plugins.rollback.intervention_record import Fingerprint
from stabletrain_plugins.rollback.intervention_replay import InterventionReplay
from stabletrain_plugins.rollback.planning import plan_repetition, plan_rollback
from stabletrain_plugins.rollback.report import stop_report
from stabletrain_plugins.rollback.rollback_rule import RollbackRule
from stabletrain_plugins.rollback.snapshot_ring import SnapshotRing
from stabletrain_plugins.rollback.weight_check import WeightCheck
from stabletrain_plugins.rollback.weight_monitor import WeightHistory, WeightMonitor, WeightProblem

METRICS = (
    MetricInfo("stability/rollbacks", "rollbacks", "made since the run began"),
    MetricInfo("stability/batches_excluded", "batches", "that are excluded from training"),
    SPIKE_SCORE,
)

_SUSPICIOUS_STEPS = 2
"""Unhealthy steps in a row after which the weights are checked out of turn. A single one may be a rare batch, which
rightly moves the weights fast."""
_DIAGNOSIS_STEPS = 500
"""Maximum number of outcomes in a diagnosis."""


class Rollback(RuleCallback, RollbackRule):  # noqa: D101
    __doc__ = RollbackRule.__doc__

    handles = frozenset({RequestKind.ROLLBACK})

    _loader: TrainLoader | None = None
    _log: InterventionLog | None = None
    _weights: WeightMonitor | None = None
    _replay: InterventionReplay | None = None
    _interventions: tuple[Intervention, ...] = ()
    _levels: tuple[AcceptedLevel, ...] = ()
    _accepting = Accepting()
    _incident_state = IncidentState()
    _weight_history = WeightHistory()
    _metrics_due = False

    def reset(self) -> None:
        """Forget the rollbacks and the weights of an earlier run."""
        super().reset()
        self._interventions, self._levels, self._weight_history = (), (), WeightHistory()
        self._accepting, self._incident_state = Accepting(), IncidentState()

    @property
    def writes_to(self) -> dict[str, str]:
        """Arguments that are folders to which it writes; a config is checked for them before the run."""
        return {} if self.spill is None else {"spill": self.spill}

    @property
    def rollbacks(self) -> int:
        """Rollbacks made in this run, those before a restart included."""
        return len(self._interventions)

    @property
    def excluded(self) -> frozenset[Identity]:
        """Identities of the excluded batches: their samples, else (or with several processes) epoch and position."""
        return excluded_batches((*self._interventions, *self._levels))

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the guard, and record the batches of the train loader on a tape."""
        if stage == "fit":
            self._close_loader()  # of a fit that was not torn down; before `reset`
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._loader = TrainLoader.of(trainer)
        memory.keep_tape(self, self._loader)
        self._ring = SnapshotRing(self.keep, self.trust_after, self._new_snapshot)
        self._outcomes: deque[Outcome] = deque(maxlen=_DIAGNOSIS_STEPS)
        self._incidents = IncidentTracker(self.patience)
        self._incidents.load(self._incident_state)
        self._requested: Request | None = None
        self._memory_reserved = False
        self._overlap = Overlap()
        self._replay = self._weights = None
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is a collective: not only on rank 0
        memory.forget_peak(self, trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders exist: exclude the batches of earlier rollbacks, and read the log to replay."""
        super().on_train_start(trainer, pl_module)
        guard, loader = self._guard_and_loader()
        _require_copies(guard)
        self._writes_files = trainer.is_global_zero and not trainer_internals.is_fast_dev_run(trainer)
        named = list(guard.module.named_parameters())
        fingerprint = Fingerprint.of(trainer, guard.module, named)
        self._log = InterventionLog(self._folder / run_files.INTERVENTIONS if self._writes_files else None, fingerprint)
        if self.replay is None:
            loader.limit_tape(memory.taped_batches(self, guard.window.largest), math.inf)
        else:
            loader.limit_tape(math.inf, math.inf)  # the log says what is needed, whatever this run's arguments are
            planned = read(self.replay, fingerprint)
            self._replay = InterventionReplay(planned, guard.counters.attempted, lambda: memory.new_snapshot(self))
        if trainer_internals.resumes_from_checkpoint(trainer):
            self._log.record_resume(guard.counters.attempted, (*self._interventions, *self._levels))
        if excluded := self.excluded:
            loader.exclude(excluded)
        check = WeightCheck(guard.module.named_parameters, self.max_growth)
        self._weights = WeightMonitor(check, self.check_every, self._weight_history)
        self._incidents.on_step_end(guard.decided, trainer.global_step, loader.mark())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget data positions in a replaced train loader (``reload_dataloaders_every_n_epochs``)."""
        self._ring.forget_unreachable(self._guard_and_loader()[1])

    def on_outcome(self, outcome: Outcome) -> None:
        """Record an outcome for the diagnosis, and update incident and trust. fp16 overflows are ignored."""
        if not self._metrics_due:  # a frozen dataclass looks in each of its bases whether it is an argument
            self._metrics_due = True
        self._outcomes.append(outcome)
        if outcome.overflow:
            return
        healthy = is_healthy(self.state, outcome)
        self._ring.on_outcome(healthy)
        self._incidents.on_outcome(healthy, outcome, self._guard_and_loader()[0].trainer.global_step)

    def on_change(self) -> None:
        """Learn the baselines anew, those of the weights' speed too, and close the incident."""
        super().on_change()
        self._incidents.close()
        if self._weights is not None:
            self._weights.forget_speeds()

    def handle_request(self, trainer: Trainer, module: LightningModule, request: Request) -> None:
        """Remember a rollback request; it is executed in this callback's ``on_train_batch_end``.

        A restore is exact only at the position in the list of callbacks at which the snapshot was taken.
        """
        self._requested = request

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Roll back if it is requested or the weights are damaged; else take a snapshot if one is due."""
        if self._leads:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        guard, loader = self._guard_and_loader()
        request = self._requested
        if request is not None:
            self._requested = None
        if request is not None or not guard.window.is_open:
            if self._replay is not None:
                self._replay_step(self._replay, request)
            else:
                problem = self._check_weights()
                if request is None and problem is not None:
                    request = Request(RequestKind.ROLLBACK, self.label, problem.reason)
                elif problem is not None and not problem.damaged:
                    problem = None  # the request says more than the speed of the weights
                if request is not None:
                    self._roll_back(request, batch, batch_idx, problem)
                else:
                    self._snapshot_if_due(batch)
            self._incidents.on_step_end(guard.decided, trainer.global_step, loader.mark())
            if self._replay is not None:
                loader.forget_before(self._replay.oldest_mark or loader.mark())
            elif self._ring.oldest_mark is None:
                loader.forget_before(self._incidents.oldest_mark)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the loader and all snapshots."""
        super().teardown(trainer, pl_module, stage)
        self._close_loader()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the loader and all snapshots: after an exception Lightning calls no teardown."""
        super().on_exception(trainer, pl_module, exception)
        if self._weights is not None:
            self._weights.drop_started()
        self._close_loader()

    def metrics(self) -> dict[str, float]:
        """The detector's metrics, the number of rollbacks, and of excluded batches; once after each step."""
        if not self._metrics_due:
            return {}
        self._metrics_due = False
        prefix = f"{self.rule.name}/" if self.rule.name else ""
        counts = {f"{prefix}rollbacks": self.rollbacks, f"{prefix}batches_excluded": len(self.excluded)}
        return {**super().metrics(), **{key: float(value) for key, value in counts.items()}}

    def state_dict(self) -> dict[str, Any]:
        """The detector's state, the rollbacks made, accepted levels, the open incident, and the weights' history."""
        history = self._weights.history if self._weights is not None else self._weight_history
        incident = self._incidents.state() if self._loader is not None else self._incident_state
        own = RollbackState(self._interventions, self._levels, self._accepting, incident, history)
        return {**super().state_dict(), **own.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; the ring starts empty."""
        super().load_state_dict(state_dict)
        own = RollbackState.of(state_dict, self.label)
        self._interventions, self._levels, self._accepting, self._incident_state, self._weight_history = own
        if self._loader is not None:
            self._incidents.load(self._incident_state)
            if excluded := self.excluded:
                self._loader.exclude(excluded)  # data without a length is fetched before on_train_start

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies do not include the running fit."""
        fit = {"_loader", "_ring", "_overlap", "_incidents", "_weights", "_log", "_replay", "_outcomes", "_requested"}
        return {key: value for key, value in super().__getstate__().items() if key not in fit}

    def planned(self, trainer: Trainer, sizes: Sizes) -> Planned:
        """What it will do, for a dry run.

        Args:
            trainer: of the traced steps.
            sizes: of the run.
        """
        return memory.planned(self, sizes)

    # ---- snapshots and rollbacks ------------------------------------------------------------------------------------

    def _snapshot_if_due(self, batch: Any) -> None:
        guard, loader = self._guard_and_loader()
        if not self._ring.is_due(guard.trainer.global_step, self.every):
            return
        guard.settle()
        if not self._incidents.last_step_was_healthy:
            return  # a state within an incident must not be restored later
        if not guard.check_state(now=True):
            return  # nor one that another plugin finds damaged
        if not self._memory_reserved:
            memory.reserve(self, self._ring, guard, loader, batch)
            self._memory_reserved = True
        self._ring.capture(guard, loader)
        if self._ring.oldest_mark is not None:
            loader.forget_before(self._ring.oldest_mark)

    def _new_snapshot(self) -> Snapshot:
        return memory.new_snapshot(self, self._overlap)

    def _check_weights(self) -> WeightProblem | None:
        guard, _ = self._guard_and_loader()
        if self._weights is None:
            return None
        suspicious = self._incidents.unhealthy_in_a_row >= _SUSPICIOUS_STEPS
        later = guard.on_device and not trainer_internals.may_be_last_batch(guard.trainer)
        return self._weights.check(guard.trainer, guard.decided, suspicious, guard.rewarming.factor, later)

    def _roll_back(self, request: Request, batch: Any, batch_idx: int, weights: WeightProblem | None) -> None:
        """Accept a new level, or make a rollback, or stop the run if none can be made."""
        guard, loader = self._guard_and_loader()
        guard.settle()
        self._overlap.settle(guard)
        self._ring.drop_torn(guard)
        if request.good_at is not None:
            self._repeat(request, batch, batch_idx)
            return
        level = new_level.level_of(self._incidents, self.state, guard.counters.attempted, weights)
        if self._several:
            level = None  # no loss asks for a rollback then, so none is a level that may be meant
        if level is not None:
            verdict = new_level.verdict(self, level, self._accepting, self._for_incidents)
            if verdict is Verdict.ACCEPT:
                made, norms, applied = self._for_incidents, self._incidents.norms, guard.trainer.global_step
                self._accept(new_level.accepted(self, request, level, self._accepting, made, norms, applied))
            if verdict is not Verdict.ROLL_BACK:
                return
        damaged_after = weights.good_at if weights is not None and weights.damaged else None
        plan = plan_rollback(
            self, request, self._for_incidents, guard, loader, self._ring, self._incidents, damaged_after
        )
        if isinstance(plan, GiveUp):
            self._stop(plan.reason, batch, batch_idx)
        if plan.snapshot is not None:
            self._ring.drop_after(plan.snapshot)
        intervention = plan.intervention
        if level is not None:
            intervention = intervention._replace(incident=level.applied, excess=level.excess(self.patience))
        try:
            self._apply(intervention, plan.snapshot)
        except SnapshotError as error:
            self._stop(f"{error}; {request.reason}", batch, batch_idx)

    @property
    def _for_incidents(self) -> tuple[Intervention, ...]:
        """The rollbacks that were made for the loss or the weights, and not to make the same steps again."""
        return tuple(each for each in self._interventions if not each.repeats)

    def _repeat(self, request: Request, batch: Any, batch_idx: int) -> None:
        """Go back to before damage that the data has not caused, and make the same steps again."""
        guard, loader = self._guard_and_loader()
        plan = plan_repetition(request, guard, loader, self._ring)
        if isinstance(plan, GiveUp):
            self._stop(plan.reason, batch, batch_idx)
        assert plan.snapshot is not None
        self._ring.drop_after(plan.snapshot)
        try:
            self._apply(plan.intervention, plan.snapshot)
        except SnapshotError as error:
            self._stop(f"{error}; {request.reason}", batch, batch_idx)

    def _accept(self, level: AcceptedLevel) -> None:
        """Let all rules learn a new level, decided now or in the run that is replayed, and record it."""
        guard, loader = self._guard_and_loader()
        incident = self._incidents.current
        new_level.learn(level, guard, loader)
        guard.drop_requests()  # in device mode, of the step that was in flight; its loss is part of the level
        self._levels = (*self._levels, level)
        at = level.applied if incident is None else incident.applied
        before = self._accepting.accepted
        belongs = before is not None and abs(at - before) <= self.cool_down  # one change, counted from its beginning
        self._accepting = Accepting(accepted=before if belongs else at)
        self._incidents.close()
        if level.rewarm != 0:
            rewarm = Request(RequestKind.REWARM, self.label, "after a new level of the loss", level.rewarm)
            guard.rewarm(rewarm)
        guard.report(Event(level.step - 1, self.label, "accept", level.level, level.was, level.summary))
        assert self._log is not None
        self._log.append(level)
        guard.flush()

    def _apply(self, intervention: Intervention, snapshot: Snapshot | None) -> None:
        """Carry out an intervention, decided now or in the run that is replayed, and record it."""
        guard, loader = self._guard_and_loader()
        earlier, levels, accepting = self._interventions, self._levels, self._accepting
        restoring.restore(intervention, snapshot, guard, loader)
        self._interventions = (*earlier, intervention)
        if intervention.incident is not None:
            place = Place(intervention.incident, intervention.excess, rollback=sum(not e.repeats for e in earlier))
            accepting = acceptance.remember(place, accepting)
        self._accepting = accepting
        if snapshot is None:  # what the checkpoint knows of interventions is older
            self._levels = levels
            loader.include(loader.excluded - self.excluded)  # batches that were given back since
            self._ring.clear()
        self._incidents.clear()
        if self._weights is not None:
            self._weights.forget_norms()
        if intervention.rewarm != 0:
            cause = f"after a rollback to {intervention.target}"
            guard.rewarm(Request(RequestKind.REWARM, self.label, cause, intervention.rewarm))
        undone, summary = float(intervention.undone), intervention.summary
        guard.report(Event(intervention.step - 1, self.label, "rollback", undone, math.nan, summary))
        assert self._log is not None
        self._log.append(intervention)
        guard.flush()

    def _stop(self, reason: str, batch: Any, batch_idx: int) -> NoReturn:
        """End the run, with a diagnosis in its folder. A collective."""
        guard, loader = self._guard_and_loader()
        default = self._ring.newest.snapshot.mark if self._ring.newest else None
        rollbacks, step = [each.step for each in self._interventions], guard.counters.attempted
        report = stop_report(reason, guard, loader, self._incidents, default, rollbacks, (batch, batch_idx))
        message = reason
        if self._writes_files:
            folder = self._folder / f"{run_files.DIAGNOSIS_PREFIX}{step}"
            diagnosis.write_bundle(folder, report, list(self._outcomes), rollbacks)
            message = f"{reason}. Diagnosis: {folder}"
        guard.report(Event(step - 1, self.label, "stop", float(self.rollbacks), float(self.max_rollbacks), reason))
        guard.flush()
        raise TrainingStopped(self.label, worded(message))

    def _replay_step(self, replay: InterventionReplay, request: Request | None) -> None:
        """Make the intervention of the log that is due, if there is one; requests are not executed."""
        guard, loader = self._guard_and_loader()
        if planned := replay.due(guard.decided):
            guard.settle()
            snapshot = replay.pop(planned)
            if isinstance(planned, AcceptedLevel):
                self._accept(planned)
            else:
                self._apply(planned, snapshot)
            if replay.is_over and snapshot is not None:
                self._ring.restart_with(snapshot)
        else:
            replay.ignore(request)
            replay.capture_if_needed(guard, loader)
        if replay.is_over:
            self._replay = None
            loader.limit_tape(memory.taped_batches(self, guard.window.largest), math.inf)

    def _guard_and_loader(self) -> tuple[StepGuard, TrainLoader]:
        assert self._guard is not None
        assert self._loader is not None
        return self._guard, self._loader

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None
            self._overlap.close()
            self._ring.release()
            self._incident_state = self._incidents.state()
            if self._weights is not None:
                self._weight_history = self._weights.history
            self._incidents.clear()
            self._replay = None


def _require_copies(guard: StepGuard) -> None:
    """Raise an error if a snapshot cannot contain the whole state of the optimizer."""
    try:
        check_state(guard)
    except SnapshotError as error:
        raise UserError(f"rollback: {error}, or train without rollback (config key plugins/spike=detect)") from error
