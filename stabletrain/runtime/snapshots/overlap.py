"""Which tensors a snapshot may still copy during the next forward pass: those that only the optimizer's update changes.

Other code may change weights between two updates, too: a hook that runs after the snapshot was taken, or a layer that
normalizes its weights in forward. The copy would then hold the old values of some and the new values of others. So the
first snapshots are not copied during the forward pass; instead, the bits of their tensors are added up when they are
taken and once more before the update. If a sum differs, no snapshot of the run is. From then on the counters of
in-place changes are compared, and a snapshot during whose copy one has increased is never restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from stabletrain.runtime.guard.bit_sums import sums_on_device
from stabletrain.runtime.guard.signals import SignalCopy
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals import state as state_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.snapshots import streams
from stabletrain.runtime.snapshots.tensor_kinds import plain_tensors

_PROBES = 3
"""Snapshots of which the bits are added up."""


class Copy(Protocol):
    """A snapshot."""

    torn: bool
    """Whether tensors were changed while they were copied."""

    def let_change(self) -> None:
        """What the device does from now on waits until the tensors are copied."""


class _Taken(NamedTuple):
    """A snapshot since which no update was made.

    Args:
        snapshot: itself.
        tensors: those that only the update should change.
        versions: their counters of in-place changes.
        sums: of their bits; None: they may still be copied.
        attempted: steps before it.
    """

    snapshot: Copy
    tensors: list[Tensor]
    versions: list[int]
    sums: Tensor | None
    attempted: int


class Overlap:
    """Lets the snapshots of one fit copy weights and optimizer state during the next forward and backward pass.

    The update waits for the copy on the device. Used in device mode only, where torch's own kernel makes the update.
    """

    def __init__(self) -> None:
        self._probes = 0
        self._is_off = False
        self._taken: _Taken | None = None
        self._verdict: SignalCopy | None = None
        self._hook: Any = None

    def begin(self, guard: StepGuard, snapshot: Copy, tensors: Sequence[Tensor]) -> frozenset[int] | None:
        """A snapshot is taken, of these plain tensors; the indices of those that may be copied until the update.

        None on a CPU, which makes the copies itself.

        Args:
            guard: of the run.
            snapshot: itself.
            tensors: all of its plain tensors.
        """
        if streams.streams_of(guard.ranks.device) is None:
            return None
        self.settle(guard)
        if self._verdict is not None:
            self._is_off |= self._verdict.read()[0] > 0  # of the snapshot before: it has been complete for long
            self._verdict = None
        if self._is_off or not guard.on_device:
            return frozenset()
        if trainer_internals.may_be_last_batch(guard.trainer) or trainer_internals.may_validate(guard.trainer):
            return frozenset()  # hooks follow that may exchange the weights
        if any(state_internals.averages_in(each, guard.module) for each in guard.trainer.callbacks):  # type: ignore[attr-defined]
            return frozenset()
        optimizer = guard.trainer.optimizers[0]
        if self._hook is None:
            self._hook = optimizer.register_step_pre_hook(lambda *_: self.end())
        updated = _updated(optimizer)
        steady = [i for i, each in enumerate(tensors) if each.data_ptr() in updated]
        chosen = [tensors[i] for i in steady]
        probes = self._probes < _PROBES and bool(chosen)
        self._probes += probes
        versions = [each._version for each in chosen]
        sums = sums_on_device(chosen) if probes else None
        self._taken = _Taken(snapshot, chosen, versions, sums, guard.counters.attempted)
        return frozenset() if probes else frozenset(steady)

    def settle(self, guard: StepGuard) -> None:
        """Between two steps: complete the snapshot since which no update was made.

        Args:
            guard: of the run.
        """
        taken = self._taken
        if taken is not None and guard.counters.attempted != taken.attempted:
            self._is_off = True  # a step that calls no hooks, such as a compiled one
            taken.snapshot.torn = taken.sums is None
        self.end()

    def end(self) -> None:
        """An update, or anything else that may change weights, follows: it waits for the copy, on the device."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        taken.snapshot.let_change()
        if [each._version for each in taken.tensors] != taken.versions:
            self._is_off = True
            if taken.sums is None:
                taken.snapshot.torn = True
                logger.warning(
                    "snapshots: code other than the optimizer has changed weights while a snapshot of them was copied. "
                    "That snapshot is not used, and the next ones are complete before the next batch begins"
                )
        elif taken.sums is not None:
            self._verdict = SignalCopy((sums_on_device(taken.tensors) != taken.sums).any().double().reshape(1))

    def close(self) -> None:
        """The fit has ended."""
        self._taken = self._verdict = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _updated(optimizer: Optimizer) -> set[int]:
    """The addresses of the parameters and of the state that an optimizer changes."""
    found = [p for group in optimizer.param_groups for p in group["params"]]
    found += [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]
    return {each.data_ptr() for each in plain_tensors(found) if each.numel()}
