"""Loads checkpoints into a module whose layers are cut: sharded ones of any number of ranks, and single files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime.internals.model_parallel import META_FILE, is_sharded_checkpoint
from stabletrain.runtime.internals.stacked_pieces import for_checkpoint
from stabletrain.strategies.tensor_parallel_layers import local_part


def load_checkpoint(
    path: Path, module: LightningModule, optimizers: Sequence[Optimizer], strict: bool, weights_only: bool | None
) -> dict[str, Any]:
    """Load model and optimizers, and return the rest of the checkpoint. All ranks must call it.

    Args:
        path: the folder of a sharded checkpoint, or a file of a whole one.
        module: whose layers are cut.
        optimizers: of the module.
        strict: whether names must agree.
        weights_only: of `torch.load`.

    Raises:
        UserError: if it is neither.
    """
    if is_sharded_checkpoint(path):
        _load_sharded(path, module, optimizers, strict)
        rest: dict[str, Any] = torch.load(path / META_FILE, map_location="cpu", weights_only=weights_only)
        return rest
    if not path.is_file():
        raise UserError(f"resume: expected the folder of a sharded checkpoint, or a file of a whole one, got {path}")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    _load_model(checkpoint.pop("state_dict"), module, strict)
    for optimizer, state in zip(optimizers, checkpoint.pop("optimizer_states", []), strict=False):
        optimizer.load_state_dict(_cut_state(state, optimizer))
    return checkpoint


def _load_sharded(path: Path, module: LightningModule, optimizers: Sequence[Optimizer], strict: bool) -> None:
    weights = get_model_state_dict(module)
    dcp.load({"state_dict": for_checkpoint(weights)}, checkpoint_id=path)
    module.load_state_dict(weights, strict=strict)
    for index, optimizer in enumerate(optimizers):
        state = get_optimizer_state_dict(module, optimizer)
        read = {f"optimizer_{index}": for_checkpoint(state)}
        dcp.load(read, checkpoint_id=path)
        _take_over(state, read[f"optimizer_{index}"])
        set_optimizer_state_dict(module, optimizer, optim_state_dict=state)


def _take_over(state: dict[str, Any], read: Mapping[str, Any]) -> None:
    """Put what has been read into a state dict; tensors have it already, since their memory was read into."""
    for key, value in read.items():
        if isinstance(value, dict):
            _take_over(state[key], value)
        elif not isinstance(value, Tensor):
            state[key] = value


def _load_model(whole: Mapping[str, Any], module: LightningModule, strict: bool) -> None:
    """Load whole tensors, each rank its part of them."""
    targets = module.state_dict()
    fitting = {
        name: _cut_like(value, targets[name]) if isinstance(value, Tensor) and name in targets else value
        for name, value in whole.items()
    }
    module.load_state_dict(fitting, strict=strict)


def _cut_like(value: Tensor, target: object) -> Tensor:
    if not isinstance(target, DTensor) or value.shape != target.shape:
        return value  # of another shape: load_state_dict says so
    mesh, placements = target.device_mesh, target.placements
    part = local_part(value.to(target.device), target)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=target.shape, stride=target.stride())


def _cut_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with its tensors cut as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for group in state["param_groups"] for key in group["params"]]
    like = dict(zip(keys, parameters, strict=False))
    entries = {
        key: {
            name: _cut_like(value, like.get(key)) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for key, entry in state["state"].items()
    }
    return {**state, "state": entries}
