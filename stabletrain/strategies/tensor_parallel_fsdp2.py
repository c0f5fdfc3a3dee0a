"""Tensor parallelism inside groups of processes, FSDP2 across them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import cast

import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from stabletrain.errors import UserError
from stabletrain.runtime.internals.stacked_pieces import pieces_of
from stabletrain.strategies.tensor_parallel import TensorParallelStrategy
from stabletrain.strategies.tensor_parallel_plan import Assignment

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FSDP2TensorParallelStrategy(TensorParallelStrategy):
    """Cuts layers over the processes of a group, and shards parameters, gradients and optimizer state over the groups.

    The processes of a group see the same batches, the groups different ones. FSDP2 shards the blocks of the module's
    lists (`nn.ModuleList`) one by one, and the rest together. Small parameters that it cannot shard beside the plan are
    kept whole, and their gradients averaged: those with the style ``"partial"``, and biases of fused layers.

    Args:
        plan: see `TensorParallelStrategy`.
        size: number of processes in a group, over which layers are cut; it divides the number of all processes.
        check: see `TensorParallelStrategy`; it compares the cut module before FSDP2 shards it.
        process_group_backend: None: nccl on GPUs, gloo on the CPU.
        timeout: see `TensorParallelStrategy`.

    Raises:
        UserError: see `TensorParallelStrategy`.
    """

    def __init__(
        self,
        plan: Mapping[str, str] | None = None,
        size: int = 2,
        check: bool = True,
        process_group_backend: str | None = None,
        timeout: float | timedelta | None = None,
    ) -> None:
        super().__init__(plan, size, check, process_group_backend, timeout)
        self._kept_whole: set[nn.Parameter] = set()

    def mesh_sizes(self, processes: int) -> tuple[int, int]:
        """The number of groups, and of processes in each.

        Args:
            processes: of the run.

        Raises:
            UserError: if ``size`` does not divide the number of processes.
        """
        size = self.size or 1
        if processes % size or processes == size:
            instead = "strategy=tensor_parallel has one group" if processes == size else "launch.processes sets it"
            raise UserError(
                f"{type(self).__name__}(size={size}): expected a number of processes that is at least twice {size} and "
                f"a multiple of it, got {processes} (config key strategy.strategy.size); {instead}"
            )
        return processes // size, size

    def _assign(self, module: LightningModule, processes: int) -> Assignment:
        assigned = super()._assign(module, processes)
        groups, _ = self.mesh_sizes(processes)
        for name, stacked in assigned.colwise.items():
            width = cast(nn.Linear, module.get_submodule(name)).in_features
            if stacked > 1 and width % groups:
                raise UserError(
                    f"{type(self).__name__}: {groups} groups do not divide {name}.in_features={width}, over which "
                    "FSDP2 shards a fused layer. Use another number of groups, or change the model"
                )
        return assigned

    def _shard_further(self, module: LightningModule, assigned: Assignment) -> None:
        mesh = self.device_mesh["data_parallel"]
        fused = {p for name, n in assigned.colwise.items() if n > 1 for p in module.get_submodule(name).parameters()}
        self._kept_whole = {
            p
            for name, p in module.named_parameters()
            if p.ndim == 0 or name in assigned.partial or (p in fused and p.ndim == 1)
        }

        def placement(parameter: nn.Parameter) -> Shard | None:
            # a rank's rows of a fused layer lie apart: FSDP2 cuts its columns
            return Shard(1) if isinstance(parameter, DTensor) and pieces_of(parameter) else None

        for block in _blocks(module):
            fully_shard(block, mesh=mesh, shard_placement_fn=placement, ignored_params=self._kept_whole)
        fully_shard(
            module,
            mesh=mesh,
            shard_placement_fn=placement,
            ignored_params=self._kept_whole,
            reshard_after_forward=False,
        )
        for name in _STEPS:
            register_fsdp_forward_method(module, name)

    def _sums(
        self, module: LightningModule, assigned: Assignment
    ) -> Iterator[tuple[Tensor, list[dist.ProcessGroup], float]]:
        mesh = self.device_mesh["data_parallel"]
        within, across = self.device_mesh["tensor_parallel"].get_group(), mesh.get_group()
        for name, parameter in module.named_parameters():
            if parameter in self._kept_whole:
                groups = [within, across] if name in assigned.partial else [across]
                yield parameter, groups, mesh.size()


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules, with parameters that are not registered elsewhere."""
    owners: dict[Tensor, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, set()).add(name)
    found: dict[str, nn.Module] = {}
    for name, each in module.named_modules():
        if isinstance(each, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found |= {f"{name}.{key}": block for key, block in each.named_children()}
    return [
        block
        for name, block in found.items()
        if any(True for _ in block.parameters())
        and all(owner.startswith(f"{name}.") for p in block.parameters() for owner in owners[p])
    ]
