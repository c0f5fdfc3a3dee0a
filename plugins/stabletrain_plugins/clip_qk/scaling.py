"""MuonClip's factors: from the largest logit of each head to a factor for each row of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain.runtime import gradients
from stabletrain.runtime.internals.shards import held_indices
from stabletrain_plugins.clip_qk.projections import Projection


def factors(largest: Tensor, tau: float) -> Tensor:
    """eta = min(1, tau / largest logit) of each head; 1 where the logit is not finite, or none was seen (-inf).

    >>> factors(torch.tensor([50.0, 400.0, -3.0, float("nan"), float("-inf")]), 100.0)
    tensor([1.0000, 0.2500, 1.0000, 1.0000, 1.0000])
    """
    one = torch.ones_like(largest)
    return torch.where(torch.isfinite(largest) & (largest > tau), tau / largest, one)


class _Scaled(NamedTuple):
    """One parameter.

    Args:
        parameter: as the optimizer has it.
        places: for each row that is here, its place in the vector of all factors.
    """

    parameter: Tensor
    places: Tensor


class Scaling:
    """Multiplies the query and key rows of several projections by the roots of their heads' factors.

    Args:
        projections: whose heads, one after the other, are the heads that `apply` gets.
        parameters: only these are multiplied; those of one optimizer.
        device: of the parameters.
    """

    def __init__(self, projections: Sequence[Projection], parameters: set[Tensor], device: torch.device) -> None:
        count = sum(each.heads for each in projections)
        groups: list[int] = []
        of: dict[Tensor, Tensor] = {}
        first_query, first_key = 1, 1 + count  # at 0: rows that are not scaled
        for each in projections:
            for rows in each.rows:
                if rows.parameter not in parameters:
                    continue
                place = of.setdefault(rows.parameter, torch.zeros(rows.parameter.shape[0], dtype=torch.long))
                start = first_query if rows.of_queries else first_key
                heads = torch.arange(start, start + rows.heads).repeat_interleave(each.width)
                place[rows.first : rows.first + len(heads)] = heads
            size = each.heads // each.kv_heads
            groups += [first_key - 1 - count + head // size for head in range(each.heads)]
            first_query, first_key = first_query + each.heads, first_key + each.kv_heads
        self._kv_heads = first_key - 1 - count
        self._groups = torch.tensor(groups, device=device)
        self._scaled = [_Scaled(p, _held(p, place).to(device)) for p, place in of.items()]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are multiplied."""
        return [each.parameter for each in self._scaled]

    @torch.no_grad()
    def apply(self, eta: Tensor) -> None:
        """Multiply queries by sqrt(eta), keys by that of the smallest eta of their group; without a read by the host.

        Args:
            eta: (heads,), float32; 1: the rows keep their bits.
        """
        keys = eta.new_ones(self._kv_heads).scatter_reduce(0, self._groups, eta, "amin")
        roots = torch.cat([eta.new_ones(1), eta, keys]).sqrt()
        for parameter, places in self._scaled:
            local = gradients.local(parameter)
            if local.numel():
                local.mul_(roots[places].view(-1, *[1] * (local.ndim - 1)))


def _held(parameter: Tensor, place: Tensor) -> Tensor:
    """The part of a vector of rows whose rows this rank has."""
    return place[held_indices(parameter)[0]] if isinstance(parameter, DTensor) else place
