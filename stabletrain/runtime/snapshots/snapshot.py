"""One consistent state of a run in memory: taken and put back between two batches, without a collective.

Both happen in ``on_train_batch_end``, at the same place in the list of callbacks: after `Snapshot.restore`, the rest
of the loop runs as it ran after `Snapshot.capture`. Each rank copies its local tensors, in place.

Not part of it, on purpose: the count of attempted steps and the steps of loggers (they never go back), Checkpoint
callbacks (files exist), and the metrics last shown.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn

from stabletrain.runtime import rng
from stabletrain.runtime.data.train_loader import DataMark, TrainLoader
from stabletrain.runtime.guard.callbacks import GuardMember, RuleCallback
from stabletrain.runtime.guard.members import Member
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals import state as state_internals
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers, bytes_of
from stabletrain.runtime.snapshots.state_tree import KeptTensor, SnapshotError, Thaw, freeze

_SCALARS = (bool, int, float, type(None), Tensor)


@runtime_checkable
class HasOwnState(Protocol):
    """A callback, module or data module with state that only it knows how to take and to put back."""

    def snapshot_state(self) -> Any:
        """The state; it is deep-copied."""

    def restore_state(self, state: Any) -> None:
        """Put a state back."""


class _Part(NamedTuple):
    """A dictionary of the live run: of an object's attributes, of a module's buffers, of an optimizer's state.

    Args:
        where: names it in an error.
        live: the dictionary itself.
        keys: those that belong to the state; None: all, so that keys that came later are removed.
    """

    where: str
    live: dict[Any, Any]
    keys: tuple[str, ...] | None = None


class Snapshot:
    """A place for one state, used again and again: its memory is allocated and touched once.

    Callbacks, the module and the data module can add state that only they know: see `HasOwnState`.

    Args:
        buffers: where the tensors' copies go.
    """

    def __init__(self, buffers: SnapshotBuffers | None = None) -> None:
        self._buffers = buffers or SnapshotBuffers()
        self.step = -1
        """Attempted optimizer steps when it was taken; -1: it is empty."""
        self.applied = 0
        """Applied optimizer steps, as in ``trainer.global_step``."""
        self.mark: DataMark | None = None
        """The data position."""

    @property
    def nbytes(self) -> int:
        """Size of the tensors' copies, bytes."""
        return self._buffers.nbytes

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to go back to."""
        return self.step < 0

    def clear(self) -> None:
        """Forget the state; the memory is kept for the next one."""
        self.step, self.mark = -1, None

    def prepare(self, guard: StepGuard) -> None:
        """Allocate and touch the memory for the state, so that `capture` costs the copy alone."""
        tensors: list[Tensor] = []
        known: dict[int, KeptTensor] = {}
        for part in _parts(guard):
            freeze(_values(part), tensors, known)
        self._buffers.prepare(tensors)

    def capture(self, guard: StepGuard, loader: TrainLoader | None) -> None:
        """Take the state; call it in ``on_train_batch_end``, when no accumulation window is open.

        Args:
            guard: of the run; an outcome in flight becomes history first.
            loader: keeps the tape that this snapshot's data position refers to.
        """
        guard.settle()
        trainer = guard.trainer
        tensors: list[Tensor] = []
        known: dict[int, KeptTensor] = {}
        live = list(_parts(guard))
        parts = [freeze(_values(part), tensors, known) for part in live]
        members = [freeze(member.state_dict(), tensors, known) for member in _stateful_members(guard)]
        self.step = -1  # until it is complete
        self._buffers.copy_in(tensors)
        self._places, self._parts, self._members = [part.where for part in live], parts, members
        self._rules = [member.state for member in _rules(guard)]
        self._schedulers = [copy.deepcopy(each.scheduler.state_dict()) for each in trainer.lr_scheduler_configs]
        self._precision = copy.deepcopy(trainer.precision_plugin.state_dict())
        self._progress = state_internals.progress(trainer)
        self._averages = state_internals.epoch_averages(trainer)
        self._own = [copy.deepcopy(each.snapshot_state()) for each in _with_own_state(guard)]
        self._overflows = guard.counters.overflows_in_a_row
        self._rng = rng.capture()
        self.mark = loader.mark() if loader is not None else None
        self.applied = trainer.global_step
        self.step = guard.counters.attempted

    def restore(
        self,
        guard: StepGuard,
        loader: TrainLoader | None,
        cause: str = "rollback",
        exclude: frozenset[int] = frozenset(),
    ) -> None:
        """Put the state back; call it where `capture` was called.

        Args:
            guard: of the run.
            loader: as for `capture`; it goes back to the snapshot's position.
            cause: told to the rules (`Rule.rebase`).
            exclude: item ids of batches that shall not come again (`TrainLoader.batches_since`).

        Raises:
            SnapshotError: if model or optimizer are no longer those of the snapshot.
        """
        if self.is_empty:
            raise SnapshotError("rollback: the snapshot is empty")
        guard.settle()
        trainer = guard.trainer
        live = list(_parts(guard))
        if (places := [part.where for part in live]) != self._places:  # before anything is put back
            changed = sorted({each for each in (*places, *self._places) if _differ(each, places, self._places)})
            raise SnapshotError(
                f"rollback: the snapshot of step {self.applied} cannot be put back: since then something was added to "
                f"the run, or removed ({', '.join(changed)}), as a callback does that unfreezes layers. Go on from a "
                "checkpoint, and let the optimizer have all parameters from the start (or plugins/spike=detect)"
            )
        thaw = Thaw(self._buffers.tensors)
        for part, frozen in zip(live, self._parts, strict=True):
            if part.keys is None:
                thaw.into(frozen, part.live, part.where)
            else:
                part.live.update(thaw.into(frozen, _values(part), part.where))
        members = [thaw.into(each, None, "a plugin's state") for each in self._members]
        thaw.finish()
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        trainer.precision_plugin.load_state_dict(copy.deepcopy(self._precision))
        state_internals.set_progress(trainer, copy.deepcopy(self._progress))
        state_internals.set_epoch_averages(trainer, self._averages)
        for owner, state in zip(_with_own_state(guard), self._own, strict=True):
            owner.restore_state(copy.deepcopy(state))
        if loader is not None and self.mark is not None:
            loader.rewind(self.mark, exclude)
        guard.after_restore(self._overflows)
        counters = guard.counters._asdict()
        for member, state in zip(_stateful_members(guard), members, strict=True):
            member.load_state_dict({**state, "counters": counters})
        for rule, state in zip(_rules(guard), self._rules, strict=True):
            rule.state = rule.rule.rebase(state, cause)
        rng.restore(self._rng)


def _differ(place: str, now: list[str], then: list[str]) -> bool:
    return now.count(place) != then.count(place)


def state_bytes(guard: StepGuard) -> int:
    """Size of the tensors of a snapshot on this rank, bytes."""
    tensors: list[Tensor] = []
    known: dict[int, KeptTensor] = {}
    for part in _parts(guard):
        freeze(_values(part), tensors, known)
    return bytes_of(tensors)


def _parts(guard: StepGuard) -> Iterator[_Part]:
    trainer = guard.trainer
    module = guard.module
    yield from _model_parts("the model", module)
    for i, metric in enumerate(state_internals.metrics_in(module)):
        yield _Part(f"metric {i}", vars(metric), tuple(state_internals.metric_fields(metric)))
    for optimizer in trainer.optimizers:
        for holder in state_internals.state_holders(optimizer):
            yield _Part("the optimizer's state", holder.state)
            for group in holder.param_groups:
                yield _Part("param_groups", group, tuple(key for key in group if key != "params"))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        averages = state_internals.averages_in(callback, module)
        for average in averages:
            yield from _model_parts(f"{type(callback).__name__}'s model", average)
        if averages or isinstance(callback, EarlyStopping):
            names = tuple(name for name, value in vars(callback).items() if isinstance(value, _SCALARS))
            yield _Part(type(callback).__name__, vars(callback), names)


def _model_parts(name: str, module: nn.Module) -> Iterator[_Part]:
    yield _Part(f"{name}'s parameters", dict(module.named_parameters()))
    for owner in state_internals.buffer_owners(module):
        yield _Part(f"{name}'s buffers", state_internals.buffers_of(owner))


def _values(part: _Part) -> dict[Any, Any]:
    return part.live if part.keys is None else {key: part.live[key] for key in part.keys if key in part.live}


def _rules(guard: StepGuard) -> list[RuleCallback]:
    return [member for member in guard.members if isinstance(member, RuleCallback)]


def _stateful_members(guard: StepGuard) -> list[Member]:
    """Members of the guard with a state of their own, besides the rules."""
    others = (m for m in guard.members if not isinstance(m, RuleCallback))
    return [member for member in others if type(member).state_dict is not GuardMember.state_dict]


def _with_own_state(guard: StepGuard) -> list[HasOwnState]:
    trainer: Any = guard.trainer
    owners: Iterable[Any] = (guard.module, trainer.datamodule, *trainer.callbacks)
    return [each for each in owners if isinstance(each, HasOwnState)]
