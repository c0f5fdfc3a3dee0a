"""Private attributes of Lightning's strategies and of torch's FSDP2 that a strategy of ours needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_BUCKET = 250 << 20
"""Bytes that are broadcast together, as in DistributedDataParallel."""


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set how many processes see different data; its default is the number of nodes.

    Args:
        strategy: before it makes the device mesh.
        size: number of processes.
    """
    strategy._data_parallel_size = size


def call_through_root(strategy: ModelParallelStrategy, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the LightningModule as if it were its ``forward``, so that the module's hooks run around it.

    Args:
        strategy: that has set up the module.
        method: name of the method; not ``forward``.
        args: of the method.
        kwargs: of the method.
    """
    module = strategy.lightning_module
    assert module is not None
    return strategy._forward_redirection(module, module, method, *args, **kwargs)


def broadcast_coalesced(tensors: Sequence[Tensor], source: int = 0) -> None:
    """Give tensors the values that they have on one rank of all, in place and in few messages. A collective.

    Args:
        tensors: plain tensors on the device of the process group, of any dtypes.
        source: the rank.
    """
    group = dist.group.WORLD
    if tensors and group is not None:
        dist._broadcast_coalesced(group, list(tensors), _BUCKET, source)  # type: ignore[attr-defined]


def forget_unreduced_gradients(root: nn.Module) -> None:
    """Drop gradients that were accumulated without being reduced, which ``zero_grad`` does not reach.

    Args:
        root: on which ``fully_shard`` was called.
    """
    for module in root.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.11 has at most one
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in group.fsdp_params if group is not None else ():
                parameter.unsharded_accumulated_grad = None  # where gradients are reduced in another dtype
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is not None:
                    whole.grad = None


def unscale_apart(scaler: torch.amp.GradScaler) -> Callable[[], None]:
    """Let a loss scaler unscale plain and sharded gradients one after another: torch's kernel takes no mixture.

    Args:
        scaler: its object is changed, not its class.

    Returns:
        The function that undoes this.
    """
    lightnings: Any = scaler
    unscale = lightnings._unscale_grads_

    def unscale_each(optimizer: Optimizer, *args: Any) -> dict[torch.device, Tensor]:
        found: dict[torch.device, Tensor] = {}
        for is_sharded in (False, True):
            groups = [
                {"params": [p for p in group["params"] if isinstance(p, DTensor) == is_sharded]}
                for group in optimizer.param_groups
            ]
            for device, overflow in unscale(SimpleNamespace(param_groups=groups), *args).items():
                found[device] = torch.maximum(found[device], overflow) if device in found else overflow
        return found

    lightnings._unscale_grads_ = unscale_each

    def undo() -> None:
        scaler.__dict__.pop("_unscale_grads_", None)

    return undo
