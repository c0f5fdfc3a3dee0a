"""Cuts the layers of a module as a plan says; the module then computes on each rank with its part of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.utils.hooks import RemovableHandle

from stabletrain.runtime.internals.model_parallel import stacked_shard
from stabletrain.strategies.tensor_parallel_plan import Assignment
from stabletrain.strategies.tensor_parallel_random import add_regions


def cut(module: nn.Module, assigned: Assignment, mesh: DeviceMesh) -> None:
    """Cut the layers of a module in place, whose parameters are equal on all ranks.

    Args:
        module: not yet sharded.
        assigned: from `assign`, for this module and this number of ranks.
        mesh: with one dimension.
    """
    for name in assigned.divided:
        owner, _, attribute = name.rpartition(".")
        each = module.get_submodule(owner)
        setattr(each, attribute, getattr(each, attribute) // mesh.size())
    for name, stacked in assigned.colwise.items():
        layer = module.get_submodule(name)
        if stacked > 1:
            _cut_stacked(layer, stacked, mesh)
        else:
            parallelize_module(layer, mesh, ColwiseParallel(), src_data_rank=None)
    for name in assigned.rowwise:
        parallelize_module(module.get_submodule(name), mesh, RowwiseParallel(), src_data_rank=None)
    add_regions(module, assigned, mesh.get_local_rank())


def _cut_stacked(layer: nn.Module, stacked: int, mesh: DeviceMesh) -> None:
    """As ColwiseParallel does, for several matrices one below the other: a rank gets its rows of each of them."""
    rows = stacked_shard(0, stacked)

    def cut_parameters(_: str, linear: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in linear.named_parameters():
            part = distribute_tensor(parameter, mesh, [rows], src_data_rank=None)
            linear.register_parameter(name, nn.Parameter(part, parameter.requires_grad))

    def whole_input(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        x = inputs[0]
        return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False)

    def own_output(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output.redistribute(placements=[stacked_shard(output.ndim - 1, stacked)]).to_local()

    distribute_module(layer, mesh, cut_parameters, whole_input, own_output)


class GradientSums:
    """Adds or averages gradients over ranks as they arrive in a backward pass, so that accumulation stays as it is.

    Args:
        entries: a parameter, the groups over whose ranks its gradient is added, and a number by which the sum is
            divided.
    """

    def __init__(self, entries: Iterable[tuple[Tensor, list[dist.ProcessGroup], float]]) -> None:
        self._entries = list(entries)
        self._handles: dict[Tensor, RemovableHandle] = {}

    def attach(self) -> None:
        """Take care of the parameters that are trained now; call it before each backward pass."""
        for parameter, groups, divisor in self._entries:
            if parameter.requires_grad and parameter not in self._handles:
                self._handles[parameter] = parameter.register_hook(_adder(groups, divisor))  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


def _adder(groups: list[dist.ProcessGroup], divisor: float) -> Any:
    def add(gradient: Tensor) -> Tensor:
        with torch.no_grad():
            mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            total = mine.clone()
            for group in groups:
                dist.all_reduce(total, group=group)
            if divisor != 1:
                total /= divisor
            if not isinstance(gradient, DTensor):
                return total
            mesh, placements = gradient.device_mesh, gradient.placements
            return DTensor.from_local(
                total, mesh, placements, run_check=False, shape=gradient.shape, stride=gradient.stride()
            )

    return add


def local_part(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a tensor that all ranks have, cut as another one is.

    Args:
        whole: of the shape of ``like``.
        like: whose mesh and placements are used.
    """
    placements: list[Placement] = [
        p if not isinstance(p, Shard) or p.dim >= 0 else Shard(p.dim + whole.ndim) for p in like.placements
    ]
    return distribute_tensor(whole, like.device_mesh, placements, src_data_rank=None).to_local()
