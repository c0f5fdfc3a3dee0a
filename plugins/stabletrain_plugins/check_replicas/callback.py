"""Compare the copies of weights and optimizer state on all ranks every N steps, and before they are stored."""

from __future__ import annotations

import socket
from typing import Any, ClassVar, Literal, NoReturn, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.metric_names import MetricInfo
from stabletrain.core.planned import Planned, Sizes
from stabletrain.core.state import from_plain, to_plain
from stabletrain.errors import is_whole, require
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.replica_parts import may_have_copies
from stabletrain.runtime.guard.replicas import Difference
from stabletrain.runtime.guard.requests import can_handle
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals import state as state_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.stop import TrainingStopped
from stabletrain.settings import worded
from stabletrain_plugins.check_replicas import history
from stabletrain_plugins.check_replicas.comparison import ReplicaComparison
from stabletrain_plugins.check_replicas.history import ReplicaState, Seen

METRICS = (
    MetricInfo("stability/replica_checks", "checks", "of the copies on all ranks, made since the run began"),
    MetricInfo("stability/replica_differences", "checks", "that found copies which differ, since the run began"),
)

OnDifference: TypeAlias = Literal["stop", "rollback", "repair"]
"""What follows when copies differ."""

_NOTHING = "check_replicas: nothing is compared: %s"
_ONE = "one process has no copies"
_ALL_SHARDED = "no rank holds a copy of what another one holds, since everything is sharded"


class CheckReplicas(GuardMember):
    """Compare the bits of weights and optimizer state on all ranks that hold copies of them.

    A bit that flips in the memory of one rank is reported by nobody: that rank trains on with other weights, and its
    gradients go into those of all. Every ``every`` attempted steps, at the end of the run, and before each snapshot and
    checkpoint, every rank computes one 64-bit number of each tensor, and one small all-gather compares them. Any single
    flipped bit is found. With three copies or more the event names the rank and the tensor, with two the tensor.

    Compared are parameters, frozen ones too, and optimizer state, where another rank has to hold the same: under DDP
    all of it, under HSDP the replicas of each shard, under tensor parallelism what is not divided. Of what is sharded
    without a copy (FSDP2, the optimizer state of ``ddp_zero1``) nothing can be compared. Buffers are not compared.

    A second difference of the same rank on the same host stops the run (exit code 3), with the name of the host.

    Args:
        every: attempted steps between checks, >= 1.
        on_difference: ``"rollback"``: the newest snapshot of `Rollback` is restored, each of which was checked, and the
            same steps are made again, so that after a transient fault the run ends as if nothing had happened; without
            `Rollback` the run is stopped. ``"repair"``: the copy of the majority is given to the other ranks, and
            training goes on; without a majority as ``"rollback"``. ``"stop"``: the run is stopped at once.

    Raises:
        UserError: if an argument is out of range.
        TrainingStopped: in a fit, on all ranks, see above.

    >>> CheckReplicas(every=50).on_difference
    'rollback'
    """

    plugin: ClassVar[str] = "check_replicas"
    slot: ClassVar[str] = "replicas"

    _comparison: ReplicaComparison | None = None
    _hosts: tuple[str, ...] = ()

    def __init__(self, every: int = 100, on_difference: OnDifference = "rollback") -> None:
        known = on_difference in ("stop", "rollback", "repair")
        for key, value, is_right, expected in (
            ("every", every, is_whole(every) and every >= 1, "a whole number >= 1"),
            ("on_difference", on_difference, known, '"stop", "rollback" or "repair"'),
        ):
            require(is_right, self.plugin, key, expected, value, f"plugins.{self.slot}", type(self).__name__)
        self.every = int(every)
        self.on_difference: OnDifference = on_difference
        self.reset()
        self._begin()

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def reset(self) -> None:
        """No checks yet."""
        self._state = ReplicaState()

    def _begin(self) -> None:
        """A fit begins: nothing was compared in it."""
        self._comparison = None
        self._good_at: int | None = None
        self._pending: Request | None = None
        self._is_issued = self._was_restored = self._is_training = False

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register with the guard."""
        if stage == "fit":
            self._begin()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The strategy has set up the model: agree on the history, and say what will not be done. A collective."""
        super().on_train_start(trainer, pl_module)
        guard, self._is_training = self._guard, True
        if guard is None:
            return
        ranks = guard.ranks
        reason = _ONE if ranks.size == 1 else ""
        if ranks.recomputes_copies and ranks.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
            reason = (
                "under tensor parallelism each rank computes the gradients of its copies itself, and kernels that add "
                "in any order round differently; use deterministic ones (config key trainer.deterministic=true)"
            )
        if reason:
            if trainer.is_global_zero:
                logger.info(_NOTHING, reason)
            return
        everyone = ranks.gather((socket.gethostname(), to_plain(self._state)))
        self._hosts = tuple(host for host, _ in everyone)
        self._state = from_plain(ReplicaState, everyone[0][1])  # what the ranks decide on is the same on all
        left_out = self._state.left_out
        self._comparison = ReplicaComparison(ranks, guard.module, trainer.optimizers, left_out)
        if trainer.is_global_zero and any(state_internals.divides_state(each) for each in trainer.optimizers):
            logger.info(
                "check_replicas: the optimizer is divided among the ranks, and after each step a rank sends the "
                "weights that it trains to all others: a flipped bit in them is overwritten, or on all ranks, and not "
                "found. Frozen parameters are compared"
            )
        if self.on_difference != "stop" and not self._can_roll_back and trainer.is_global_zero:
            logger.info(
                "check_replicas: no plugin can roll back, so the run is stopped where a rollback would be needed (%s)",
                worded("config key plugins/spike=rollback"),
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what the run has arrived at.

        Raises:
            TrainingStopped: if copies differ; it is too late for a rollback.
        """
        super().on_train_end(trainer, pl_module)
        if self._guard is not None and not self.check_state(now=True):
            self._stop(self._guard, "ranks have different weights at the end of the run, too late for a rollback")

    # ---- the check --------------------------------------------------------------------------------------------------

    def check_state(self, now: bool) -> bool:
        """Compare the copies if that is due; whether they are equal as far as known. A collective.

        Args:
            now: see `GuardMember.check_state`.
        """
        guard = self._guard
        if guard is None or self._comparison is None or self._comparison.is_empty:
            return True
        if self._pending is not None:
            if now:
                return False
            if not self._is_issued:
                self._is_issued = True
                guard.request(self._pending)
                return False
            self._pending = None  # who took the request has not restored anything
        step = guard.decided
        if self._good_at == step and not self._was_restored:
            return True
        if not (now or self._is_due(guard, step)):
            return True
        return self._check(guard, self._comparison, step, between_batches=not now)

    def _is_due(self, guard: StepGuard, step: int) -> bool:
        last = self._good_at
        if last is None or self._was_restored:
            return True
        return step // self.every != last // self.every or trainer_internals.ends_run(guard.trainer)

    def _check(self, guard: StepGuard, comparison: ReplicaComparison, step: int, between_batches: bool) -> bool:
        found = comparison.differences()
        if comparison.is_empty:
            if guard.trainer.is_global_zero:
                logger.info(_NOTHING, _ALL_SHARDED)
            return True
        self._was_restored = False
        left_out = tuple(sorted(comparison.left_out or ()))
        self._state = self._state._replace(checks=self._state.checks + 1, left_out=left_out)
        if not found:
            self._good_at = step
            return True
        guard.settle()
        new = self._seen(found, step, guard.trainer.global_step)
        before = history.seen_before(new, self._state.seen)
        self._state = self._state._replace(seen=(*self._state.seen, new))
        tensors = [str(each.part) for each in found]
        reason = history.description(new, tensors, self._good_at)
        guard.report(Event(step - 1, self.plugin, "replicas_differ", float(len(found)), 0.0, reason))
        if before is not None:
            self._stop(guard, f"{reason}; {history.remedy(new, before)}")
        if self.on_difference == "stop":
            self._stop(guard, reason)
        if self.on_difference == "repair" and all(each.source is not None for each in found):
            comparison.repair(found)
            if still := comparison.differences():
                self._stop(guard, f"{reason}; {still[0]} differs after it was repaired, too")
            self._good_at = step
            return True
        if not self._can_roll_back or self._good_at is None:
            why = "no plugin can roll back" if self._good_at is not None else "there is no earlier state to go back to"
            self._stop(guard, f"{reason}; {why}")
        self._pending = Request(RequestKind.ROLLBACK, self.plugin, reason, good_at=self._good_at)
        self._is_issued = between_batches  # else it waits for the end of the next step
        if self._is_issued:
            guard.request(self._pending)
        return False

    def _seen(self, found: list[Difference], step: int, applied: int) -> Seen:
        named = all(each.source is not None for each in found)
        ranks = tuple(sorted({rank for each in found for rank in (*each.ranks, *each.missing)}))
        return Seen(step, applied, named, ranks, tuple(self._hosts[rank] for rank in ranks))

    @property
    def _can_roll_back(self) -> bool:
        return self._guard is not None and can_handle(self._guard.trainer, RequestKind.ROLLBACK)

    def _stop(self, guard: StepGuard, reason: str) -> NoReturn:
        differences = float(len(self._state.seen))
        guard.report(Event(guard.counters.attempted - 1, self.plugin, "stop", differences, 0.0, reason))
        guard.flush()
        raise TrainingStopped(self.plugin, worded(reason))

    def planned(self, trainer: Trainer, sizes: Sizes) -> Planned:
        """What it will do, for a dry run.

        Args:
            trainer: of the traced steps.
            sizes: of the run.
        """
        is_alone = trainer.world_size == 1
        if is_alone or not any(map(may_have_copies, trainer.lightning_module.parameters())):
            return Planned(text=f"nothing is compared: {_ONE if is_alone else _ALL_SHARDED}")
        then = {"stop": "stops the run", "rollback": "goes back to a snapshot", "repair": "copies the majority's"}
        text = f"compares the copies of weights and optimizer state every {self.every} attempted steps"
        return Planned(text=f"{text}; if they differ, it {then[self.on_difference]}")

    # ---- metrics and state ------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """The checks made and the differences found, if there is something to compare."""
        if self._comparison is None or self._comparison.is_empty:
            return {}
        return {"replica_checks": float(self._state.checks), "replica_differences": float(len(self._state.seen))}

    def state_dict(self) -> dict[str, Any]:
        """The checks made and the differences found."""
        return {**super().state_dict(), "state": to_plain(self._state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint. In a running fit an earlier state was restored: what was found stays known."""
        super().load_state_dict(state_dict)
        if self._is_training:
            self._pending, self._is_issued, self._was_restored = None, False, True
        else:
            self._state = from_plain(ReplicaState, state_dict["state"])

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies do not include the running fit."""
        return {key: value for key, value in super().__getstate__().items() if key not in ("_comparison", "_hosts")}
