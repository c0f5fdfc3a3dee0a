"""Optimizers that keep a second copy of the weights, from which the next step would bring back what was scaled."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime import gradients
from stabletrain.runtime.internals.state import state_holders

_CLOSE = 0.1
"""Relative distance to the weights below which a tensor is a copy of them; moments of gradients are far from that."""


def refuse_copies(optimizer: Optimizer, module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Raise an error if the optimizer's state has a copy of a parameter. Reads from the device.

    Args:
        optimizer: after its first step.
        module: that is trained.
        parameters: that are to be scaled.

    Raises:
        UserError: names the entry of the state, such as the ``z`` of schedule-free optimizers.
    """
    holders = state_holders(optimizer, module)
    for parameter in parameters:
        weight = gradients.local(parameter).detach()
        for holder in holders:
            for key, value in holder.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and _is_close(value, weight):
                    raise UserError(
                        f"clip_qk: {type(optimizer).__name__} keeps another copy of the weights (state {key!r}), from "
                        "which it computes the next ones: scaled rows would come back. Use another optimizer, or "
                        "remove the plugin (config key plugins/qk=none)"
                    )


def _is_close(value: Tensor, weight: Tensor) -> bool:
    mine = gradients.local(value).detach()
    if mine.shape != weight.shape or not mine.is_floating_point():
        return False
    size = torch.linalg.vector_norm(weight.float())
    return bool(torch.linalg.vector_norm(mine.float() - weight.float()) < _CLOSE * size)
