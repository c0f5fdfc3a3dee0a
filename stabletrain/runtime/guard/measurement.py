"""Measures a step before its decision: the loss of the window and the norm of the gradient, the same on all ranks.

Everything that the ranks have to tell each other is added up in one all-reduce, since what it costs is the waiting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stabletrain.runtime import gradients
from stabletrain.runtime.ranks import Ranks


class Measurement(NamedTuple):
    """What is known of a step before its decision.

    Args:
        loss: mean over the window and over all ranks, of the losses as passed; None if no rank had one.
        grad_norm: of the gradients as passed.
        weight: the sum of the weights of all ranks.
        flags: of one process as they are; of several 0-d tensors, the number of ranks on which each is set, so that no
            rank has to read the device.
    """

    loss: Tensor | None
    grad_norm: Tensor
    weight: float | Tensor
    flags: list[Tensor | bool]


def measure(
    ranks: Ranks, losses: Sequence[Tensor], weights: Sequence[float] | None, grads: Sequence[Tensor], *flags: bool
) -> Measurement:
    """Measure a step. A collective, also for ranks without a loss or without gradients.

    Ranks that see the same data (tensor parallelism) do not change the mean. A NaN or infinity on any rank makes mean
    and norm non-finite on all ranks.

    Args:
        ranks: of the fit.
        losses: 0-d tensors, one for each micro-batch of this rank, multiplied by its weight, if it has one.
        weights: of the micro-batches of this rank, each >= 0; None: all weigh the same. If all are 0 on all ranks, the
            mean is NaN.
        grads: the complete gradients.
        flags: of this rank.
    """
    weight = len(losses) if weights is None else math.fsum(weights)
    if ranks.size == 1:
        return Measurement(_own_mean(losses, weights), gradients.global_norm(grads), weight, list(flags))
    share = gradients.norm_share(grads, ranks.device)
    total = torch.stack(list(losses)).sum(dtype=torch.float32) if losses else torch.zeros((), device=ranks.device)
    numbers = (torch.full_like(share.square, each) for each in (len(losses), weight, *flags))
    # in float64, which holds counts and float32 exactly
    total, square, count, all_weights, *set_on = ranks.sum_tensor(torch.stack([total.double(), share.square, *numbers]))
    # only a rank without a loss has to read the device
    loss = (total / all_weights).float() if losses or count else None
    return Measurement(loss, share.norm(square), all_weights, set_on)


def common_norm(ranks: Ranks, grads: Sequence[Tensor]) -> Tensor:
    """The global norm of gradients, the same on all ranks. A collective."""
    if ranks.size == 1:
        return gradients.global_norm(grads)
    share = gradients.norm_share(grads, ranks.device)
    return share.norm(ranks.sum_tensor(share.square))


def _own_mean(losses: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor | None:
    if not losses:
        return None
    if weights is not None:
        return torch.stack(list(losses)).sum() / math.fsum(weights)
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).mean()
