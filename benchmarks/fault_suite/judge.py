"""Figures from records: survival, damage, recovery, false positives, wasted steps, and the acceptance rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from json_lines import Record

from fault_suite.contenders import DEFAULT, NOTHING
from fault_suite.scenarios import FAULT_FREE, PLAIN, Scenario
from fault_suite.trial import EVERY

CEILING = 10.0
"""Larger and non-finite held-out losses are replaced by this, in nats; a uniform guess has ln 84 = 4.43 nats."""
NEAR = 0.1
"""Difference of the held-out loss from the twin's, in nats, below which a run counts as recovered, and an intervention
as a false positive."""
LAST = 10
"""Number of measurements of the held-out loss, the last of a run, whose mean is its loss at the end."""
Key = tuple[str, str, str, int]


class Figures(NamedTuple):
    """Figures of one contender in one scenario with one seed.

    Args:
        ended: the reason why the run did not survive; "" if it did.
        damage: loss above the reference, summed over the steps, in nats x steps; NaN if the run did not survive.
        recovered: steps from the fault until the loss stays near the reference; None: never.
        false_positives: number of skips and rollbacks without a fault.
        wasted: number of attempted steps that were skipped or undone.
        loss: held-out loss at the end, in nats per character; NaN if the run did not survive.
    """

    ended: str
    damage: float
    recovered: int | None
    false_positives: int
    wasted: int
    loss: float


class Cell(NamedTuple):
    """Figures of one contender in one scenario, over all seeds."""

    seeds: int
    survived: int
    ended: str
    damage: float
    recovered: int | None
    false_positives: int
    wasted: float
    loss: float

    @property
    def has_survived(self) -> bool:
        """Whether the run survived with every seed."""
        return self.survived == self.seeds


@dataclass
class Results:
    """All records, by contender, condition, scenario and seed."""

    records: dict[Key, Record]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, records: Iterable[Record], seeds: Sequence[int]) -> Results:
        """Make the results of some records; of several records of a run the last one is used."""
        return cls({key(r): r for r in records}, tuple(seeds))

    def figures(self, contender: str, scenario: Scenario, seed: int) -> Figures | None:
        """Return the figures of one run; None if its record or that of its reference is missing."""
        condition = scenario.condition
        name = scenario.name if scenario.make_fault is not None else FAULT_FREE
        record = self.records.get((contender, condition.name, name, seed))
        twin = condition.name if scenario.make_fault is not None else PLAIN.name
        reference = self.records.get((contender, twin, FAULT_FREE, seed))
        if record is None or reference is None:
            return None
        excess = [_capped(a) - _capped(b) for a, b in zip(record["losses"], reference["losses"], strict=False)]
        ended = record["ended"]
        after = condition.fault if scenario.legitimate else condition.fault + scenario.window
        unneeded = [step for step in (*record["skips"], *record["rollbacks"]) if step >= after]
        if not scenario.legitimate:
            unneeded = [step for step in unneeded if _last(excess, step - condition.fault) < NEAR]
        earlier = (
            0 if scenario.make_fault is not None else sum(step < condition.fault for step in _interventions(record))
        )
        damage = math.nan if ended else EVERY * sum(excess)
        before = self.records[contender, condition.name, FAULT_FREE, seed]
        healthy = sum(step < condition.fault for step in before["skips"])
        wasted = record["wasted"] - (healthy if scenario.make_fault is not None else 0)
        loss = math.nan if ended else statistics.fmean(map(_capped, record["losses"][-LAST:]))
        return Figures(ended, damage, _recovered(excess), len(unneeded) + earlier, wasted, loss)

    def cell(self, contender: str, scenario: Scenario) -> Cell | None:
        """Return the figures over all seeds; None if one is missing."""
        found = [self.figures(contender, scenario, seed) for seed in self.seeds]
        each = [figures for figures in found if figures is not None]
        if len(each) < len(self.seeds):
            return None
        ends = [figures.ended for figures in each if figures.ended]
        times = [figures.recovered for figures in each]
        known = [time for time in times if time is not None]
        return Cell(
            len(each),
            len(each) - len(ends),
            ends[0] if ends else "",
            statistics.fmean(figures.damage for figures in each),
            max(known) if len(known) == len(times) else None,
            sum(figures.false_positives for figures in each),
            statistics.fmean(figures.wasted for figures in each),
            statistics.fmean(figures.loss for figures in each),
        )

    def spread(self, scenario: Scenario) -> float:
        """Standard deviation over the seeds of the summed loss of the fault-free default stack, nats x steps."""
        sums = []
        for seed in self.seeds:
            record = self.records.get((DEFAULT, scenario.condition.name, FAULT_FREE, seed))
            if record is not None:
                sums.append(EVERY * sum(map(_capped, record["losses"])))
        return statistics.stdev(sums) if len(sums) > 1 else math.nan


class Verdict(NamedTuple):
    """Whether the default stack satisfies the rule in one scenario; ``holds_strictly``: without the seeds' spread."""

    best: str
    best_damage: float
    allowed: float
    nothing: float
    spread: float
    damage: float
    holds: bool
    holds_strictly: bool


def verdict(results: Results, scenario: Scenario, contenders: Sequence[str]) -> Verdict | None:
    """The rule: survive always; damage at most the largest of 1.15 x the best, the best + 2, two standard deviations.

    Args:
        results: all records.
        scenario: the row.
        contenders: the contenders to compare the default stack with, including itself.
    """
    cells = {name: results.cell(name, scenario) for name in contenders}
    alive = {name: cell.damage for name, cell in cells.items() if cell is not None and cell.has_survived}
    mine = cells.get(DEFAULT)
    if mine is None or not alive:
        return None
    best = min(alive, key=lambda name: alive[name])
    spread = results.spread(scenario)
    allowed = slack(alive[best], spread)
    nothing = alive.get(NOTHING, math.nan)
    limits = [alive[best], *([nothing] if NOTHING in alive else [])]
    holds, strictly = (
        mine.has_survived and all(mine.damage <= slack(limit, sigma) for limit in limits) for sigma in (spread, 0.0)
    )
    return Verdict(best, alive[best], allowed, nothing, spread, mine.damage, holds, strictly)


def slack(damage: float, spread: float) -> float:
    """Return the damage that the rule allows: the largest of 1.15 x damage, damage + 2, and 2 standard deviations."""
    return max(1.15 * damage, damage + 2.0, 0.0 if math.isnan(spread) else 2.0 * spread)


def key(record: Record) -> Key:
    """Return the key of a record."""
    return record["contender"], record["condition"], record["scenario"], record["seed"]


def _interventions(record: Record) -> list[int]:
    return [*record["skips"], *record["rollbacks"]]


def _capped(loss: float | None) -> float:
    return CEILING if loss is None else min(loss, CEILING)


def _last(excess: Sequence[float], steps: int) -> float:
    index = min(steps // EVERY - 1, len(excess) - 1)
    return excess[index] if index >= 0 else math.inf


def _recovered(excess: Sequence[float]) -> int | None:
    """Return the step, from the fault, of the first of three consecutive measurements near the reference."""
    for i in range(len(excess) - 2):
        if all(x < NEAR for x in excess[i : i + 3]):
            return EVERY * i
    return None
