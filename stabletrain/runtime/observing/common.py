"""Readings of all ranks together: sums added up, of maxima the largest."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from stabletrain.runtime.ranks import Ranks

Sums = Mapping[str, tuple[float, float]]
"""By name a sum and its weight; the mean is their ratio."""


class CommonReadings:
    """Makes readings the same on all ranks, whose names may differ.

    Names are exchanged only when those of a rank are new, so that a flush costs three small collectives.

    Args:
        ranks: of the fit.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._names: tuple[list[str], list[str]] = [], []

    def of(self, sums: Sums, maxima: Mapping[str, float]) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
        """The readings of all ranks. A collective, also for ranks without readings.

        Args:
            sums: of this rank, finite.
            maxima: of this rank, finite.
        """
        if self._ranks.size == 1:
            return dict(sums), dict(maxima)
        known = self._names
        if self._ranks.any(not (sums.keys() <= {*known[0]} and maxima.keys() <= {*known[1]})):
            everyone = self._ranks.gather((list(sums), list(maxima)))
            first, second = (list(dict.fromkeys(name for each in everyone for name in each[i])) for i in (0, 1))
            # what was known stays, since a rank that has not seen it now may see it again
            self._names = known = [*dict.fromkeys(known[0] + first)], [*dict.fromkeys(known[1] + second)]
        numbers = [sums.get(name, (0.0, 0.0)) for name in known[0]]
        packed = torch.tensor(numbers, dtype=torch.float64, device=self._ranks.device).reshape(-1, 2)
        totals = self._ranks.sum_tensor(packed).tolist()
        largest = self._ranks.max_each([maxima.get(name, -math.inf) for name in known[1]]).tolist()
        return (
            {name: (total, weight) for name, (total, weight) in zip(known[0], totals, strict=True) if weight},
            {name: value for name, value in zip(known[1], largest, strict=True) if value > -math.inf},
        )
