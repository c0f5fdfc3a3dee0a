"""The memory of one step's tensors, by torch's private trackers."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from stabletrain.runtime.internals.fake_world import NotTraceable

_NAMES = {
    "Parameter": "parameters",
    "Sharded Param": "parameters",
    "Unsharded Param": "whole parameters",
    "Buffer": "buffers",
    "Gradient": "gradients",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "whole gradients",
    "Activation": "activations",
    "Temp": "temporary, in backward",
    "Optstate": "optimizer state, temporary tensors",
    "OptState": "optimizer state, temporary tensors",
    "Other": "batch, buckets, averages",
    "Inputs": "batch, buckets, averages",
    "All Gather": "all-gather",
    "Reduce Scatter": "reduce-scatter",
}
"""The trackers' categories, and ours."""


class Peak(NamedTuple):
    """The largest memory of a step.

    Args:
        total: of all tensors of this rank, bytes.
        parts: bytes by what the tensors are.
        where: in which part of the step, and in which module.
    """

    total: int
    parts: dict[str, int]
    where: str


class StepTracker:
    """Follows the tensors of a step, in a ``with`` statement; on real ranks as in a fake world.

    Args:
        module: that is trained, as the strategy has made it.
        optimizers: of the run, with their state.
        held: further tensors that exist already, such as the batch.

    Raises:
        NotTraceable: if torch has no such tracker any more.
    """

    def __init__(self, module: nn.Module, optimizers: list[Optimizer], held: list[Tensor]) -> None:
        try:
            kinds = _trackers()
        except (ImportError, AttributeError) as error:
            raise NotTraceable(f"torch {torch.__version__} has no memory tracker: {error}") from error
        self._stack = ExitStack()
        if isinstance(module, FSDPModule):
            self._tracker: Any = kinds[1](module, optimizers[0] if optimizers else None)
            self._tracker.track_inputs(tuple(held))
            _track_plain(self._tracker, module)
        else:
            self._tracker = kinds[0]()
            self._tracker.track_external(module, *held, *optimizers)  # the last kind that is given counts

    def __enter__(self) -> StepTracker:
        self._stack.enter_context(self._tracker)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def update_begins(self) -> None:
        """The gradients are complete: what is allocated from now on is the optimizer's."""
        self._tracker.updates = True

    def batch_begins(self) -> None:
        """What is allocated from now on belongs to forward and backward."""
        self._tracker.updates = False

    def held(self, part: str) -> int:
        """Bytes that tensors of one kind take now.

        Args:
            part: one of the kinds in `Peak.parts`.
        """
        return _named(self._tracker.get_tracker_snapshot("current"))[0].get(part, 0)

    @property
    def peak(self) -> Peak:
        """The largest memory since the beginning."""
        parts, total = _named(self._tracker.get_tracker_snapshot("peak"))
        return Peak(total, parts, self._tracker.where)


def _named(snapshot: dict[Any, dict[Any, int]]) -> tuple[dict[str, int], int]:
    parts: dict[str, int] = {}
    total = 0
    for of_device in snapshot.values():
        for kind, size in of_device.items():
            if kind == "Total":
                total += size
            elif size:
                name = _NAMES.get(kind.value, kind.value)
                parts[name] = parts.get(name, 0) + size
    return parts, total


def _track_plain(tracker: Any, module: nn.Module) -> None:
    """Count parameters that FSDP2 leaves whole, which its tracker does not know."""
    from torch.distributed._tools.fsdp2_mem_tracker import _FSDPRefType

    for p in module.parameters():
        tracker._update_and_maybe_create_winfos(p, _FSDPRefType.SHARDED_PARAM)


def _trackers() -> tuple[Any, Any]:
    """The trackers of plain modules and of FSDP2's, for modules that are called within themselves or several times."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker

    class Place:
        """Remembers where the peak was, and is told when the optimizer updates."""

        where = "before the step"
        updates = False

        @property
        def _in_opt(self) -> bool:
            """The trackers take all of ``optimizer.step`` for the update, but Lightning runs the batch within it."""
            return self.updates

        @_in_opt.setter
        def _in_opt(self, value: bool) -> None:
            pass

        def _update_peak_stats(self: Any, state: object) -> None:
            for device, now in self._curr_mem_snap.items():
                if self._peak_mem.get(device, 0) < now["Total"]:
                    self._peak_mem[device] = now["Total"]
                    self._peak_mem_snap[device] = dict(now)
                    self.where = _place(self)

    class Plain(Place, MemTracker):  # type: ignore[no-untyped-call]
        """For modules that are not sharded."""

        def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
            if not self._mod_tracker.is_bw:  # a second forward is not another step
                self.memory_tracking.pop(module, None)  # type: ignore[no-untyped-call]
            super()._pre_fw_hook(module, inputs)

        def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> Any:
            for p in module.parameters():  # it adds hooks where there are none, which frozen ones do not accept
                if not p.requires_grad and p not in self._param_to_grad_hook_handles:
                    none = OrderedDict[int, Any]()
                    self._param_to_grad_hook_handles[p] = (RemovableHandle(none), RemovableHandle(none))
            return super()._track_module_params_and_buffers(module, install_grad_hooks)

    class Sharded(Place, FSDPMemTracker):  # type: ignore[no-untyped-call]
        """For modules that FSDP2 has sharded."""

        def _fsdp_state_pre_forward(self, fsdp_mod: Any, orig_fsdp_state_pre_fw: Any) -> Any:
            inner = super()._fsdp_state_pre_forward(fsdp_mod, orig_fsdp_state_pre_fw)

            @wraps(inner)
            def called(*args: Any, **kwargs: Any) -> Any:
                if not self._mod_tracker.is_bw:
                    self.memory_tracking.pop(fsdp_mod, None)  # type: ignore[no-untyped-call]
                return inner(*args, **kwargs)

            return called

    for kind, needed in ((Plain, MemTracker), (Sharded, FSDPMemTracker)):
        missing = [name for name in ("_update_peak_stats", "get_tracker_snapshot") if not hasattr(needed, name)]
        if missing:
            raise AttributeError(f"{kind.__name__}: {needed.__name__} has no {missing[0]}")
    return Plain, Sharded


def _place(tracker: Any) -> str:
    if tracker._in_opt:
        return "optimizer step"
    phase = "backward" if tracker._mod_tracker.is_bw else "forward"
    names = [
        name.partition(".")[2].removeprefix("module.") for name in tracker._mod_tracker.parents if name != "Global"
    ]
    inner = max(names, key=lambda name: (name.count("."), len(name)), default="")
    return f"{phase} of {inner}" if inner else phase
