"""Private parts of Lightning's ModelParallelStrategy, of its helpers and of DTensor, which our strategies use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.load import _METADATA_FILENAME
from packaging.version import Version
from torch import nn
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.optim import Optimizer

META_FILE: str = _METADATA_FILENAME
"""The file of a sharded checkpoint with everything but tensors of model and optimizers."""


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a path is a folder that a ModelParallelStrategy has written as a checkpoint."""
    return path.is_dir() and (path / META_FILE).is_file()


def set_mesh_sizes(strategy: Any, data_parallel: int, tensor_parallel: int) -> None:
    """Set the sizes of the device mesh, before the strategy's ``setup_environment`` makes it.

    Args:
        strategy: a ModelParallelStrategy.
        data_parallel: number of groups that see different data.
        tensor_parallel: number of ranks in each of them.
    """
    strategy._data_parallel_size, strategy._tensor_parallel_size = data_parallel, tensor_parallel


def use_own_sampler(trainer: Any) -> None:
    """Let loaders keep their samplers, instead of ones that give each rank or group its part of the data.

    Args:
        trainer: before its loaders are made.
    """
    trainer._accelerator_connector.use_distributed_sampler = False


def refuse_device_decisions(optimizer: Optimizer) -> None:
    """Let nobody give an optimizer ``grad_scale`` and ``found_inf``, which it takes only if it is fused."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate and initialise the parameters that are on the meta device, by their modules' ``reset_parameters``."""
    _materialize_distributed_module(module, device)


def stacked_shard(dim: int, stacked: int) -> Placement:
    """The placement of a tensor that holds matrices one below the other, each of which is cut into equal parts.

    A rank has the same part of each of them: of the rows q, k, v, cut for two ranks, the first has (q1, k1, v1).

    Args:
        dim: the dimension along which they are stacked.
        stacked: how many there are, at least 2.
    """
    return _StridedShard(dim, split_factor=stacked)


def cuts_stacked(version: str) -> bool:
    """Whether a version of torch redistributes tensors that are placed by `stacked_shard`; 2.11 raises an error."""
    return Version(version).release >= (2, 12)


def stacked_in(placement: object) -> int | None:
    """The number of stacked matrices of a placement from `stacked_shard`; None for any other."""
    return int(placement.split_factor) if isinstance(placement, _StridedShard) else None
