"""One consistent state of a run in memory, captured and restored between two batches, without a collective.

Both happen in ``on_train_batch_end``, at the same position in the list of callbacks: after `Snapshot.restore`, the rest
of the loop runs as it ran after `Snapshot.capture`. Each rank copies its local tensors, in place.

Not part of a snapshot: the count of attempted steps and the steps of loggers (they never go back), Checkpoint callbacks
(their files exist), and the metrics displayed last.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.runtime import rng
from stabletrain.runtime.data.train_loader import DataMark, TrainLoader
from stabletrain.runtime.guard.callbacks import GuardMember, RuleCallback
from stabletrain.runtime.guard.hooks import HasOwnState, has_own_state
from stabletrain.runtime.guard.members import Member
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals import state as state_internals
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers, bytes_of
from stabletrain.runtime.snapshots.optimizer_attributes import OptimizerAttributes, check_optimizers, copied, taken
from stabletrain.runtime.snapshots.overlap import Overlap
from stabletrain.runtime.snapshots.state_tree import Flattener, Restorer, SnapshotError

_SCALARS = (bool, int, float, type(None), Tensor)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Delay Python's garbage collection of cycles.

    Flattening the state of thousands of tensors makes so many small objects that it would run again and again, each
    time over everything that is alive: with 3,000 small tensors a capture takes 60 ms without it and 165 to 330 with.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Part(NamedTuple):
    """A dictionary in the live run: attributes of an object, buffers of a module, or state of an optimizer.

    Args:
        name: names it in an error.
        live: the dictionary itself.
        keys: those that belong to the state; None: all, and a restore removes keys that were added later.
        of_epoch: whether it was computed from the batches of the epoch so far.
        objects_stay: whether objects in it are those of `OptimizerAttributes`, which restores them.
    """

    name: str
    live: dict[Any, Any]
    keys: tuple[str, ...] | None = None
    of_epoch: bool = False
    objects_stay: bool = False

    def flatten(self, flattener: Flattener) -> Any:
        """The skeleton of its values."""
        return flattener.flatten(_values(self), taken if self.objects_stay else None)


class Snapshot:
    """Holds one state at a time and is reused for the next one: its memory is allocated and touched once.

    Callbacks, the module and the data module can add state of their own: see `HasOwnState`.

    Args:
        buffers: where the copies of the tensors go; None: main memory.
        overlap: shared by the snapshots of a run, whose tensors on CUDA may still be copied when `capture` returns;
            None: all are copied.
    """

    def __init__(self, buffers: SnapshotBuffers | None = None, overlap: Overlap | None = None) -> None:
        self._buffers = buffers or SnapshotBuffers()
        self._overlap = overlap
        self.torn = False
        """Whether weights were changed while they were copied: such a snapshot must not be restored."""
        self.step = -1
        """Attempted optimizer steps at the capture; -1: the snapshot is empty."""
        self.applied = 0
        """Applied optimizer steps at the capture, as in ``trainer.global_step``."""
        self.mark: DataMark | None = None
        """The data position at the capture."""

    @property
    def nbytes(self) -> int:
        """Size of the tensors' copies, bytes."""
        return self._buffers.nbytes

    @property
    def is_empty(self) -> bool:
        """Whether there is no state to restore."""
        return self.step < 0

    def can_rewind(self, loader: TrainLoader) -> bool:
        """Whether the loader can be rewound to the data position of the capture."""
        return self.mark is not None and loader.can_rewind(self.mark)

    def clear(self) -> None:
        """Drop the state; its memory is reused by the next capture."""
        self.step, self.mark = -1, None

    def let_change(self) -> None:
        """What the device does from now on waits until the state is copied; the host does not wait."""
        self._buffers.let_change()

    @_without_collection()
    def prepare(self, guard: StepGuard) -> None:
        """Allocate and touch the memory for the state, so that `capture` costs only the copy."""
        self._buffers.prepare(_tensors(guard))

    @_without_collection()
    def capture(self, guard: StepGuard, loader: TrainLoader | None) -> None:
        """Copy the state; call it in ``on_train_batch_end``, when no accumulation window is open.

        Args:
            guard: of the run; an outcome that is still being copied from the device is observed first.
            loader: the train loader whose position is part of the state; None: the data position is not.
        """
        guard.settle()
        trainer = guard.trainer
        flattener = Flattener(copied)
        live = list(_parts(guard))
        parts = [part.flatten(flattener) for part in live]
        attributes = OptimizerAttributes(trainer.optimizers, guard.module, flattener)
        hidden = flattener.flatten(guard.control.hidden.values())
        members = [flattener.flatten(member.state_dict()) for member in _stateful_members(guard)]
        self.step = -1  # empty until it is complete
        steady = None if self._overlap is None else self._overlap.begin(guard, self, flattener.tensors)
        self._buffers.copy_in(flattener.tensors, steady)
        self.torn = False
        self._names, self._parts, self._members = [part.name for part in live], parts, members
        self._groups, self._hidden = [each.capture() for each in guard.all_parameters], hidden
        self._attributes = attributes
        self._rules = [member.states for member in _rules(guard)]
        self._schedulers = [copy.deepcopy(each.scheduler.state_dict()) for each in trainer.lr_scheduler_configs]
        self._precision = copy.deepcopy(trainer.precision_plugin.state_dict())
        self._progress = state_internals.progress(trainer)
        self._averages = state_internals.epoch_averages(trainer)
        self._own = [copy.deepcopy(each.snapshot_state()) for each in _with_own_state(guard)]
        self._guard = guard.state_dict()
        self._rng = rng.capture()
        self.mark = loader.mark() if loader is not None else None
        self.applied = trainer.global_step
        self.step = guard.counters.attempted

    @_without_collection()
    def restore(
        self,
        guard: StepGuard,
        loader: TrainLoader | None,
        cause: str | None,
        exclude: frozenset[int] = frozenset(),
        rewind: bool = True,
    ) -> None:
        """Put the state back; call it where `capture` was called. The snapshot can be restored again.

        Args:
            guard: of the run.
            loader: as for `capture`; it is rewound to the snapshot's position.
            cause: passed to ``Rule.rebase`` of every rule, such as ``"rollback"``; None: the rules' states are those of
                the capture, so that the same steps are made again.
            exclude: numbers on the tape of batches that the loader does not return again
                (`TrainLoader.batches_since`).
            rewind: False: the run goes on with its next batch, because the loader cannot be rewound. Besides the data
                position, the progress in the epoch, its averages and metrics, and the random generators then stay.

        Raises:
            SnapshotError: if the snapshot is empty, or model or optimizer are no longer those of the snapshot.
        """
        if self.is_empty:
            raise SnapshotError("the snapshot is empty: capture a state before restoring it")
        guard.settle()
        trainer = guard.trainer
        live = self._live_parts(guard, rewind)
        for parameters, groups in zip(guard.all_parameters, self._groups, strict=True):
            parameters.restore(groups, trainer.global_step, rewind)
        restorer = Restorer(self._buffers.tensors)
        for part, node in zip(live, self._parts, strict=True):
            if part.of_epoch and not rewind:
                continue
            if part.keys is None:
                restorer.restore(node, part.live, part.name)
            else:
                part.live.update(restorer.restore(node, _values(part), part.name))
        self._attributes.restore(restorer)
        hidden = guard.control.hidden
        # tensors that were replaced since are restored as new ones: other code may still hold those of today
        current = {path: each for path, each in hidden.values().items() if hidden.in_place(path)}
        attributes = restorer.restore(self._hidden, current, "hidden state")
        members = [restorer.restore(each, None, "a plugin's state") for each in self._members]
        restorer.finish()
        hidden.put(attributes)
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        trainer.precision_plugin.load_state_dict(copy.deepcopy(self._precision))
        if rewind:
            state_internals.set_progress(trainer, copy.deepcopy(self._progress))
            state_internals.set_epoch_averages(trainer, self._averages)
        else:
            state_internals.set_global_step(trainer, self.applied)
        for owner, state in zip(_with_own_state(guard), self._own, strict=True):
            owner.restore_state(copy.deepcopy(state))
        if rewind and loader is not None and self.mark is not None:
            loader.rewind(self.mark, exclude)
        guard.after_restore(self._guard)
        own = guard.state_dict()
        for member, state in zip(_stateful_members(guard), members, strict=True):
            member.load_state_dict({**state, **own})
        for rule, states in zip(_rules(guard), self._rules, strict=True):
            rule.states = [state if cause is None else rule.rule.rebase(state, cause) for state in states]
        if rewind:
            rng.restore(self._rng)

    def _live_parts(self, guard: StepGuard, rewind: bool) -> list[_Part]:
        """The live parts, in the order of the capture; nothing is changed yet.

        Parameter groups are those of the capture: the run that is rewound comes again to where others were added, and
        one that is not rewound keeps the others as they are.
        """
        groups = [[group for group, _ in holder] for each in self._groups for holder in each.groups]
        if not rewind:
            present = {id(group) for each in _holders(guard) for group in each.param_groups}
            groups = [[group for group in holder if id(group) in present] for holder in groups]
        live = list(_parts(guard, groups, [holder for each in self._groups for holder in each.holders]))
        names = [part.name for part in live]
        if names == self._names:
            return live
        changed = sorted(name for name in {*names, *self._names} if names.count(name) != self._names.count(name))
        raise SnapshotError(
            f"the snapshot of step {self.applied} cannot be restored: parts of the run were added or removed since "
            f"it was captured ({', '.join(changed)}); expected the same modules and optimizer. Resume from a checkpoint"
        )


def check_state(guard: StepGuard) -> None:
    """Raise an error if the run has state that a snapshot cannot take; call it before the first step.

    Raises:
        SnapshotError: naming what cannot be copied.
    """
    check_optimizers(guard.trainer.optimizers, guard.module)


def state_bytes(guard: StepGuard) -> int:
    """Size of the tensors of a snapshot on this rank, bytes."""
    return bytes_of(_tensors(guard))


def _tensors(guard: StepGuard) -> list[Tensor]:
    flattener = Flattener(copied)
    for part in _parts(guard):
        part.flatten(flattener)
    OptimizerAttributes(guard.trainer.optimizers, guard.module, flattener)
    flattener.flatten(guard.control.hidden.values())
    return flattener.tensors


def _parts(
    guard: StepGuard,
    groups: Sequence[Sequence[dict[str, Any]]] | None = None,
    holders: Sequence[Optimizer] | None = None,
) -> Iterator[_Part]:
    """The parts of a run.

    Args:
        guard: of the run.
        groups: the parameter groups of each of ``holders``; None: the present ones.
        holders: the optimizers, and those that they hold; None: the present ones.
    """
    trainer = guard.trainer
    module = guard.module
    yield from _model_parts("the model", module)
    for i, metric in enumerate(state_internals.metrics_in(module)):
        yield _Part(f"metric {i}", vars(metric), tuple(state_internals.metric_fields(metric)), of_epoch=True)
    for i, holder in enumerate(_holders(guard) if holders is None else holders):
        if "state" in vars(holder):  # else it is computed from what the optimizer holds
            yield _Part("the optimizer's state", holder.state, objects_stay=True)
        for group in groups[i] if groups is not None and i < len(groups) else holder.param_groups:
            yield _Part("param_groups", group, tuple(key for key in group if key != "params"))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        averages = state_internals.averages_in(callback, module)
        for average in averages:
            yield from _model_parts(f"{type(callback).__name__}'s model", average)
        if averages or isinstance(callback, both(EarlyStopping)):
            names = tuple(name for name, value in vars(callback).items() if isinstance(value, _SCALARS))
            yield _Part(type(callback).__name__, vars(callback), names)


def _holders(guard: StepGuard) -> list[Optimizer]:
    found = (state_internals.state_holders(each, guard.module) for each in guard.trainer.optimizers)
    return [holder for holders in found for holder in holders]


def _model_parts(name: str, module: nn.Module) -> Iterator[_Part]:
    yield _Part(f"{name}'s parameters", dict(module.named_parameters()))
    for owner in state_internals.buffer_owners(module):
        yield _Part(f"{name}'s buffers", state_internals.buffers_of(owner))


def _values(part: _Part) -> dict[Any, Any]:
    return part.live if part.keys is None else {key: part.live[key] for key in part.keys if key in part.live}


def _rules(guard: StepGuard) -> list[RuleCallback]:
    return [member for member in guard.members if isinstance(member, RuleCallback)]


def _stateful_members(guard: StepGuard) -> list[Member]:
    """Members of the guard, other than rules, that define a state_dict."""
    others = (m for m in guard.members if not isinstance(m, RuleCallback))
    return [member for member in others if type(member).state_dict is not GuardMember.state_dict]


def _with_own_state(guard: StepGuard) -> list[HasOwnState]:
    trainer: Any = guard.trainer
    owners: Iterable[Any] = (guard.module, trainer.datamodule, *trainer.callbacks)
    return [each for each in owners if has_own_state(each)]
