"""Groups of runs that differ in the seed alone, with mean and standard deviation of what they reached."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stabletrain.tracking.comparison import RunSummary
from stabletrain.tracking.differences import Row, is_seed
from stabletrain.tracking.measures import shown


class Spread(NamedTuple):
    """A number over several runs.

    Args:
        mean: of the finite values; NaN if there is none.
        deviation: standard deviation of them, with n - 1; None for fewer than two.
        finite: how many are finite.
        known: how many runs have the number at all.
    """

    mean: float
    deviation: float | None
    finite: int
    known: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Runs with one configuration and several seeds.

    Args:
        values: of the parameters in which the variants differ.
        members: places of its runs in the comparison.
        seeds: of its runs, in the same order.
        outcomes: of its runs, in the same order.
        spreads: by the key of the measure; those that no run has are missing.
    """

    values: Mapping[str, str | None]
    members: tuple[int, ...]
    seeds: tuple[str, ...]
    outcomes: tuple[str, ...]
    spreads: Mapping[str, Spread]

    @property
    def label(self) -> str:
        """The parameters in which it differs from the others, such as ``clip=zscore``; empty if there is no other."""
        return label(self.values)

    def text(self, key: str) -> str:
        """Mean and standard deviation of a measure, if it is not zero, and of how many runs if not of all.

        Args:
            key: of the measure.
        """
        spread = self.spreads.get(key)
        if spread is None:
            return "-"
        mean = shown(key, spread.mean)
        deviation = "" if not spread.deviation else f" ± {shown(key, spread.deviation)}"
        of = "" if spread.finite == len(self.members) else f" ({spread.finite} of {len(self.members)})"
        return f"{mean}{deviation}{of}"

    @property
    def ends(self) -> str:
        """The outcome of each run, equal ones counted: ``healthy × 2, diverged``."""
        counts = Counter(self.outcomes)
        return ", ".join(f"{word} × {count}" if count > 1 else word for word, count in counts.items())


def label(values: Mapping[str, str | None]) -> str:
    """Return parameters as text.

    >>> label({"clip": "zscore", "optimizer.lr": "0.1", "x": None})
    'clip=zscore optimizer.lr=0.1 x=-'
    """
    return " ".join(f"{name}={'-' if value is None else value}" for name, value in values.items())


def by_seed(runs: Sequence[RunSummary], params: Mapping[str, Row]) -> list[Variant]:
    """Group runs by all parameters but the seeds, in the order of their first runs.

    Args:
        runs: the runs.
        params: those in which the runs differ, see `stabletrain.tracking.differences`.
    """
    kept = {name: row for name, row in params.items() if not is_seed(name)}
    seeds = {name: row for name, row in params.items() if is_seed(name)}
    groups: dict[tuple[str | None, ...], list[int]] = {}
    for place in range(len(runs)):
        groups.setdefault(tuple(row[place] for row in kept.values()), []).append(place)
    return [
        Variant(
            values=dict(zip(kept, values, strict=True)),
            members=tuple(members),
            seeds=tuple(_seed(runs[place], seeds, place) for place in members),
            outcomes=tuple(runs[place].outcome or runs[place].status.lower() for place in members),
            spreads=_spreads([runs[place].measures for place in members]),
        )
        for values, members in groups.items()
    ]


def _seed(run: RunSummary, seeds: Mapping[str, Row], place: int) -> str:
    found = run.params.get("seed") or next((row[place] for row in seeds.values()), None)
    return "-" if found is None else found


def _spreads(measures: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    spreads = {}
    for key in dict.fromkeys(key for each in measures for key in each):
        known = [each[key] for each in measures if key in each]
        finite = [value for value in known if math.isfinite(value)]
        spreads[key] = Spread(
            statistics.fmean(finite) if finite else math.nan,
            statistics.stdev(finite) if len(finite) > 1 else None,
            len(finite),
            len(known),
        )
    return spreads
