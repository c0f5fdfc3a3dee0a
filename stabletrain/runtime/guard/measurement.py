"""Measures a step before its decision: the loss of the window and the norm of the gradient, the same on all ranks.

All that the ranks have to tell each other is added up in one all-reduce, since its cost is the waiting for each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stabletrain.runtime import gradients
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.ranks import Ranks


class Measurement(NamedTuple):
    """What is known of a step before its decision.

    Args:
        loss: the unscaled mean over the window and over all ranks; None if no rank had a loss.
        grad_norm: the global norm of the gradients.
        flags: was a change announced, and has the step to be dropped, because a loss is missing or all weights are 0?
            Of one process as they are; of several 0-d tensors, the number of ranks on which each is set, so that no
            rank has to read the device.
    """

    loss: Tensor | None
    grad_norm: Tensor
    flags: list[Tensor | bool]


def measure(
    ranks: Ranks, window: AccumulationWindow, grads: list[Tensor], scale: float, weighs: bool, changed: bool
) -> Measurement:
    """Measure a step, and start a new window. A collective, also for ranks without a loss or without gradients.

    Args:
        ranks: of the fit.
        window: the losses of this rank.
        grads: complete and unscaled; with ``weighs`` they become weighted means, in place.
        scale: of the loss scaler, on the losses.
        weighs: whether the losses are multiplied by the window's weights.
        changed: whether this rank has announced a change.
    """
    size, weights, lacks_loss = window.size, window.weights, window.lacks_loss
    flags: list[Tensor | bool]
    if not weighs:
        losses, factor = window.take(), size / scale
        if ranks.size == 1:
            loss, grad_norm, flags = _own_mean(losses, None), gradients.global_norm(grads), [changed, lacks_loss]
        else:
            loss, grad_norm, _, flags = add_up(ranks, losses, None, grads, changed, lacks_loss)
        return Measurement(loss if loss is None or factor == 1.0 else loss * factor, grad_norm, flags)
    # these gradients are measured once they are multiplied by what is known afterwards
    loss, grad_norm, weight, flags = add_up(ranks, window.take(), weights, [], changed, lacks_loss)
    if loss is None:
        return Measurement(None, grad_norm, flags)
    if isinstance(weight, Tensor):
        flags[1] = flags[1] + (weight == 0)
        weight = weight.masked_fill(weight == 0, 1.0)
    elif weight == 0:
        flags, weight = [torch.full((), float(each), device=loss.device) for each in (changed, True)], 1.0
    gradients.scale_(grads, ranks.size * size / weight)
    return Measurement(loss * (size / scale), common_norm(ranks, grads), flags)


class Sums(NamedTuple):
    """The losses and gradients of all ranks together.

    Args:
        loss: the mean, 0-d; None if no rank had one, NaN if all weights are 0.
        grad_norm: the global norm.
        weight: the sum of all weights.
        flags: as in `Measurement`.
    """

    loss: Tensor | None
    grad_norm: Tensor
    weight: float | Tensor
    flags: list[Tensor | bool]


def add_up(
    ranks: Ranks, losses: Sequence[Tensor], weights: Sequence[float] | None, grads: Sequence[Tensor], *flags: bool
) -> Sums:
    """Add up losses, squares of gradients and flags over all ranks, in one all-reduce. A collective.

    Ranks that see the same data (tensor parallelism) do not change the mean. A NaN or infinity on any rank makes mean
    or norm non-finite on all ranks.

    Args:
        ranks: of the fit.
        losses: 0-d tensors, one for each micro-batch of this rank, multiplied by its weight if it has one.
        weights: of the micro-batches of this rank, each >= 0; None: all weigh the same.
        grads: may be empty on some ranks.
        flags: of this rank.
    """
    weight = len(losses) if weights is None else math.fsum(weights)
    if ranks.size == 1:
        return Sums(_own_mean(losses, weights), gradients.global_norm(grads), weight, list(flags))
    share = gradients.norm_share(grads, ranks.device)
    total = torch.stack(list(losses)).sum(dtype=torch.float32) if losses else torch.zeros((), device=ranks.device)
    numbers = (torch.full_like(share.square, each) for each in (len(losses), weight, *flags))
    packed = torch.stack([total.double(), share.square, *numbers])  # float64 holds counts and float32 exactly
    total, square, count, all_weights, *set_on = ranks.sum_tensor(packed)
    # only a rank without a loss has to read the device
    loss = (total / all_weights).float() if losses or count else None
    return Sums(loss, share.norm(square), all_weights, list(set_on))


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
