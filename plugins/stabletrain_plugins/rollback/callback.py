"""Go back to a healthy state in memory, leave out the offending batches, and go on."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.outcome import Outcome
from stabletrain.core.state import from_plain, to_plain
from stabletrain.runtime.data.tape import TapedBatch
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.callbacks import RuleCallback
from stabletrain.runtime.guard.requests import dispatch
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.records import diagnosis
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.run_length import run_length
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers
from stabletrain.runtime.snapshots.disk_buffers import DiskBuffers
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain.runtime.snapshots.state_tree import SnapshotError
from stabletrain.runtime.stop import TrainingStopped
from stabletrain_plugins.rollback import memory, older_checkpoint
from stabletrain_plugins.rollback.incidents import IncidentTracker, is_healthy, offending
from stabletrain_plugins.rollback.intervention_replay import InterventionReplay
from stabletrain_plugins.rollback.interventions import NAME, Fingerprint, Intervention, InterventionLog, read
from stabletrain_plugins.rollback.report import report
from stabletrain_plugins.rollback.rollback_rule import RollbackRule
from stabletrain_plugins.rollback.snapshot_ring import SnapshotRing
from stabletrain_plugins.rollback.weights import WeightCheck, WeightHistory, WeightMonitor

_OUTCOMES = 500
"""Steps in a diagnosis."""


class Rollback(RuleCallback, RollbackRule):
    """Go back to a healthy state in memory when training diverges, leave out the offending batches, and go on.

    A ring of snapshots holds everything that training changes, the data position included. A snapshot is trusted when
    ``trust_after`` healthy steps have followed it. Three things lead to a rollback: the loss is away from its baseline
    for ``patience`` steps (the detector of `DetectSpikes`), another plugin asks for one (too many skipped steps in a
    row), or the weights themselves are damaged. Then the newest trusted snapshot is restored, the batches since the
    suspicion began are left out, now and in later epochs and after a restart, the learning rate climbs again over
    ``rewarm`` steps, and training goes on in the same process. Trouble at the same place again leads further back, with
    twice as many batches left out. Without a snapshot to go back to, the newest good checkpoint on disk from before the
    trouble is used; without one, and after ``max_rollbacks``, the run is stopped, with a diagnosis in its folder.

    Each rollback is a line in ``interventions.jsonl``, from which ``replay`` makes the same run again, bit for bit.

    Args:
        every: applied steps from one snapshot to the next, >= 1; the first is taken after the first step.
        keep: snapshots in the ring, >= 2; each takes as much memory as parameters and optimizer state.
        trust_after: healthy steps in a row that make a snapshot trusted, 1 to ``every``.
        drop: which batches are left out: ``"offending"`` (since the suspicion began), ``"since_snapshot"``, ``"none"``.
        baselines: the histories of all rules afterwards: ``"restore"`` (the snapshot's) or ``"reset"`` (empty).
        rewarm: applied steps over which the learning rate climbs again, >= 0; None: as long as the schedule says. Needs
            `ScheduleLR`.
        max_rollbacks: rollbacks in a run, >= 1; one more is a clean stop.
        cool_down: attempted steps after the place of trouble within which trouble again means going further back, >= 0.
        check_every: attempted steps from one look at the weights to the next, >= 1; after an unhealthy step at once.
        max_growth: factor on a weight tensor's root mean square from one look to the next that means damage, > 1.
        where: ``"host"``: snapshots in main memory; ``"device"``: beside the tensors, faster.
        max_memory: the most that snapshots and remembered batches may take on a rank, as ``"8GB"`` or ``"500MiB"``;
            more is refused before training has gone on. None: what is free.
        spill: folder on a local disk that holds the snapshots instead of memory; they cost a write to it then.
        replay: an ``interventions.jsonl``, or the folder of its run: make these interventions, and decide nothing until
            the last of them is made.
        z_threshold: robust standard deviations above the centre at which outliers begin, > 0.
        window: steps of history, >= 2.
        delay: steps that an accepted step waits before it counts as history, >= 0.
        min_samples: steps in the window before anything is judged, 2 to ``window``.
        patience: steps outside after which a raised loss is a divergence, 1 to ``window``; also non-finite steps in a
            row.
        regime_after: steps outside after which the gradient norm has a new level, 2 to ``window``.
        min_sigma_norm: floor of the norm's standard deviation, in nats of its logarithm, > 0.
        min_sigma_loss: floor of the loss's standard deviation, as a share of its median, >= 0.
        score_window: steps that the metric ``spike_score`` looks back, >= 1.
        name: what events and checkpoints call it.

    Raises:
        UserError: if an argument is out of range, and in a fit if memory does not suffice or the log is another run's.
        TrainingStopped: in a fit, when the budget is used up or there is nothing to go back to.

    References:
        Chowdhery et al., PaLM, 2022, https://arxiv.org/abs/2204.02311 (section 5.1: restart about 100 steps before the
        spike, skip 200 to 500 batches).

    >>> Rollback(every=200, keep=2).trust_after
    25
    """

    handles = frozenset({RequestKind.ROLLBACK})

    _loader: TrainLoader | None = None
    _log: InterventionLog | None = None
    _weights: WeightMonitor | None = None
    _replay: InterventionReplay | None = None
    _made: tuple[Intervention, ...] = ()
    _watched = WeightHistory()
    _has_news = False

    def reset(self) -> None:
        """A new run: nothing is known, nothing was left out."""
        super().reset()
        self._made, self._watched = (), WeightHistory()

    @property
    def rollbacks(self) -> int:
        """Rollbacks made in this run, those before a restart included."""
        return len(self._made)

    @property
    def excluded(self) -> frozenset[tuple[Any, ...]]:
        """Names of the batches that are left out: by samples, else (or with several processes) by epoch and place."""
        return frozenset(name for made in self._made for name in made.excluded)

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the guard, and stand between Lightning and the train loader."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._close_loader()
        self._loader = TrainLoader.of(trainer)
        self._loader.keep_tape()
        self._ring = SnapshotRing(self.keep, self.trust_after, self._new_snapshot)
        self._outcomes: deque[Outcome] = deque(maxlen=_OUTCOMES)
        self._trouble = IncidentTracker()
        self._requested: Request | None = None
        self._ready = False
        self._replay = self._weights = None
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks: not only on rank 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders are known: leave out what was left out before, and read the log to replay."""
        super().on_train_start(trainer, pl_module)
        guard, loader = self._parts()
        self._quiet = not trainer.is_global_zero or trainer_internals.is_fast_dev_run(trainer)
        named = list(guard.module.named_parameters())
        fingerprint = Fingerprint.of(trainer, guard.module, named)
        self._log = InterventionLog(None if self._quiet else self._folder / NAME, fingerprint)
        if self.replay is not None:
            planned = read(self.replay, fingerprint)
            self._replay = InterventionReplay(planned, guard.counters.attempted, self._new_snapshot)
        if trainer_internals.resumes_from_checkpoint(trainer):
            self._log.resumed(guard.counters.attempted, self._made)
        if excluded := self.excluded:
            loader.exclude(excluded)
        check = WeightCheck([name for name, _ in named], [p for _, p in named], self.max_growth)
        self._weights = WeightMonitor(check, self.check_every, self._watched)
        self._trouble.step_ends(guard.decided, trainer.global_step, loader.mark())
        if trainer.is_global_zero and (warning := self.too_rare(run_length(trainer).total_steps)):
            logger.warning(warning)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where epochs have loaders of their own (``reload_dataloaders_every_n_epochs``), the ring begins anew."""
        self._ring.drop_out_of_reach(self._parts()[1])

    def on_outcome(self, outcome: Outcome) -> None:
        """Keep it for a diagnosis, and note when trouble begins and ends."""
        self._has_news = True
        self._outcomes.append(outcome)
        if outcome.overflow:
            return
        healthy = is_healthy(self.state, outcome)
        self._ring.outcome(healthy)
        self._trouble.outcome(healthy, outcome.step, self._parts()[0].trainer.global_step)

    def handle_request(self, trainer: Trainer, module: LightningModule, request: Request) -> None:
        """A rule asks to go back; it is done at this callback's own place, where the snapshots were taken."""
        self._requested = request

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go back, if somebody asks for it; else take a snapshot, if it is time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        guard, loader = self._parts()
        request, self._requested = self._requested, None
        if request is not None or not trainer_internals.window_is_open(trainer):
            if self._replay is not None:
                self._follow(self._replay, request)
            elif request := request or self._look_at_weights():
                self._go_back(request, batch, batch_idx)
            else:
                self._snapshot_if_due(batch)
            self._trouble.step_ends(guard.decided, trainer.global_step, loader.mark())
            if not len(self._ring):
                loader.forget_before((self._replay and self._replay.oldest_mark) or self._trouble.oldest_mark)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the loader and of all snapshots."""
        super().teardown(trainer, pl_module, stage)
        self._close_loader()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the loader and of all snapshots: after an exception Lightning calls no teardown."""
        super().on_exception(trainer, pl_module, exception)
        self._close_loader()

    def metrics(self) -> dict[str, float]:
        """The detector's readings, the number of rollbacks, and of batches left out; once after each step."""
        if not self._has_news:
            return {}
        self._has_news = False
        prefix = f"{self.rule.name}/" if self.rule.name else ""
        counts = {f"{prefix}rollbacks": self.rollbacks, f"{prefix}batches_excluded": len(self.excluded)}
        return {**super().metrics(), **{key: float(value) for key, value in counts.items()}}

    def state_dict(self) -> dict[str, Any]:
        """The detector's state, the rollbacks made, and what was seen of the weights."""
        watched = to_plain(self._weights.seen if self._weights is not None else self._watched)
        return {**super().state_dict(), "made": to_plain(self._made), "weights": watched}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; the ring begins empty."""
        super().load_state_dict(state_dict)
        self._made = from_plain(tuple[Intervention, ...], state_dict.get("made", []))
        self._watched = from_plain(WeightHistory, state_dict["weights"]) if "weights" in state_dict else WeightHistory()
        if self._loader is not None and (excluded := self.excluded):
            self._loader.exclude(excluded)  # now: data without a length are fetched ahead of on_train_start

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies leave the running fit behind."""
        fit = {"_loader", "_ring", "_trouble", "_weights", "_log", "_replay", "_outcomes", "_requested"}
        return {key: value for key, value in super().__getstate__().items() if key not in fit}

    def _snapshot_if_due(self, batch: Any) -> None:
        guard, loader = self._parts()
        newest, applied = self._ring.newest, guard.trainer.global_step
        if applied == 0 or (newest is not None and applied // self.every == newest.snapshot.applied // self.every):
            return
        guard.settle()
        if not self._trouble.last_step_was_healthy:
            return  # a snapshot of trouble would help nobody
        if not self._ready:
            memory.take(self, self._ring, guard, batch)
            self._ready = True
        self._ring.take(guard, loader)
        oldest = self._ring.oldest
        if oldest is not None and oldest.snapshot.mark is not None:
            loader.forget_before(oldest.snapshot.mark)

    def _new_snapshot(self) -> Snapshot:
        return Snapshot(DiskBuffers(Path(self.spill)) if self.spill else SnapshotBuffers(self.where))

    def _look_at_weights(self) -> Request | None:
        """A request, if the weights are damaged on any rank."""
        guard, _ = self._parts()
        healthy = self._trouble.last_step_was_healthy
        problem = self._weights.look(guard.trainer, guard.decided, not healthy) if self._weights else None
        return None if problem is None else Request(RequestKind.ROLLBACK, self.label, problem)

    def _go_back(self, request: Request, batch: Any, batch_idx: int) -> None:
        guard, _ = self._parts()
        guard.settle()
        step, applied = guard.counters.attempted, guard.trainer.global_step
        if self.rollbacks >= self.max_rollbacks:
            reason = f"{self.rollbacks} rollbacks did not help (plugins.spike.max_rollbacks); now: {request.reason}"
            self._give_up(reason, batch, batch_idx)
        last, suspicion = self._made[-1] if self._made else None, self._trouble.since
        again = last is not None and step <= last.step + last.undone + self.cool_down
        limit = last.applied[1] if again and last is not None else None
        target = self._ring.trusted(limit)
        checkpoint = None
        if target is None:
            before = min(applied, suspicion.applied + 1 if suspicion else applied, applied if limit is None else limit)
            checkpoint = older_checkpoint.find(guard.trainer, before)
            if checkpoint is None:
                target = self._ring.trusted()
        if target is None and checkpoint is None:
            untrusted = "none was taken yet"
            if len(self._ring):
                untrusted = f"{len(self._ring)} in memory had not stayed healthy for {self.trust_after} steps"
            where = f"there is no snapshot to go back to ({untrusted}; plugins.spike.every, plugins.spike.trust_after)"
            self._give_up(f"{where}, and no checkpoint on disk from before; {request.reason}", batch, batch_idx)
        items = self._batches_to_exclude(target.snapshot if target else None, again)
        several = guard.trainer.world_size > 1
        made = Intervention(
            step=step,
            to=None if target is None else target.snapshot.step,
            checkpoint=checkpoint,
            applied=(applied, -1),
            excluded=tuple(item.position_key if several else item.identity for item in items),
            samples=tuple(item.identity for item in items) if several else (),
            rewarm=self.rewarm,
            baselines=self.baselines,
            plugin=request.plugin,
            cause=request.reason,
        )
        if target is not None:
            self._ring.drop_after(target)
        try:
            self._make(made, target.snapshot if target else None)
        except SnapshotError as error:
            self._give_up(f"{error}; {request.reason}", batch, batch_idx)

    def _batches_to_exclude(self, target: Snapshot | None, again: bool) -> list[TapedBatch]:
        guard, loader = self._parts()
        if self.drop == "none":
            return []
        if len(loader.loaders) > 1:
            logger.warning("rollback: no batches are left out: with several train loaders a batch is several")
            return []
        if target is None or target.mark is None:  # the data go on: these are not wanted in later epochs either
            return self._trouble.batches(loader, None)
        if self.drop == "since_snapshot":
            return list(loader.batches_since(target.mark).values())
        at_least = max(1, 2 * len(self._made[-1].excluded)) if again else 0
        window = guard.trainer.accumulate_grad_batches
        return offending(self._trouble, loader, target.mark, at_least, window)

    def _make(self, made: Intervention, target: Snapshot | None) -> None:
        """Make an intervention, decided now or in the run that is replayed."""
        guard, loader = self._parts()
        trainer, before = guard.trainer, self._made
        if made.excluded:
            loader.exclude(made.excluded)
        if target is not None:
            target.restore(guard, loader, made.cause)
            where = f"to the snapshot of step {target.applied}"
        else:
            assert made.checkpoint is not None
            older_checkpoint.restore(guard, made.checkpoint, made.cause)
            self._ring.clear()
            where = f"to {made.checkpoint} (step {trainer.global_step}; the data go on)"
        if made.baselines == "reset":
            for member in guard.members:
                if isinstance(member, RuleCallback):
                    member.state = member.rule.init()
        made = made._replace(applied=(made.applied[0], trainer.global_step))
        self._made = (*before, made)  # never goes back, though a checkpoint has what was made until then
        self._trouble.is_over()
        if self._weights is not None:
            self._weights.begin_anew()
        if made.rewarm != 0:
            rewarm = Request(RequestKind.REWARM, self.label, f"after a rollback {where}", made.rewarm)
            dispatch(rewarm, trainer, guard.module)
        excluded = f", {len(made.excluded)} batches left out" if made.excluded else ""
        reason = f"back {where} from step {made.applied[0]}{excluded}: {made.plugin}: {made.cause}"
        guard.report(Event(made.step - 1, self.label, "rollback", float(made.undone), math.nan, reason))
        assert self._log is not None
        self._log.append(made)
        guard.flush()

    def _give_up(self, reason: str, batch: Any, batch_idx: int) -> NoReturn:
        guard, loader = self._parts()
        newest = self._ring.newest
        otherwise = newest.snapshot.mark if newest else None
        rollbacks = [made.step for made in self._made]
        content = report(reason, guard, loader, self._trouble, otherwise, rollbacks, (batch, batch_idx))
        step = guard.counters.attempted
        folder = self._folder / f"diagnosis-{step}"
        if not self._quiet:
            diagnosis.write_bundle(folder, content, list(self._outcomes), rollbacks)
        guard.report(Event(step - 1, self.label, "stop", float(self.rollbacks), float(self.max_rollbacks), reason))
        guard.flush()
        raise TrainingStopped(self.label, reason if self._quiet else f"{reason}. Diagnosis: {folder}")

    def _follow(self, replay: InterventionReplay, request: Request | None) -> None:
        """Do what the log says, and nothing else, until it ends."""
        guard, loader = self._parts()
        planned = replay.due(guard.decided)
        if planned is None:
            if request is not None:
                logger.warning(
                    "rollback: the log that is replayed has no rollback here, so none is made: %s", request.reason
                )
            replay.snapshot(guard, loader)
        else:
            guard.settle()
            target = replay.take(planned)
            self._make(planned, target)
            if replay.is_over and target is not None:
                self._ring.begin_with(target)
        if replay.oldest_mark is not None:
            loader.forget_before(replay.oldest_mark)
        if replay.is_over:
            self._replay = None

    def _parts(self) -> tuple[StepGuard, TrainLoader]:
        assert self._guard is not None
        assert self._loader is not None
        return self._guard, self._loader

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None
            self._ring.release()
            self._trouble.is_over()
            self._replay = None
