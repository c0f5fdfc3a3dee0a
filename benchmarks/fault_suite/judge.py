"""From records to figures: survival, damage, recovery, false positives, waste, and the rule that must hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fault_suite.contenders import DEFAULT, NOTHING
from fault_suite.harness import EVERY, Record
from fault_suite.scenarios import FAULT_FREE, PLAIN, Scenario

CEILING = 10.0
"""A held-out loss above this, or none at all, counts as this; a uniform guess has ln 84 = 4.43 nats."""
NEAR = 0.1
"""Nats above the twin within which a run has recovered, and an intervention is unasked for."""
Key = tuple[str, str, str, int]


class Figures(NamedTuple):
    """One contender in one scenario with one seed.

    Args:
        ended: why it did not survive; "" if it did.
        damage: nats x steps above the reference; NaN unless it survived.
        recovered: steps from the fault until it stays near the reference; None: never.
        false_positives: skips and rollbacks with nothing wrong.
        wasted: attempted steps that left no trace in the weights.
    """

    ended: str
    damage: float
    recovered: int | None
    false_positives: int
    wasted: int


class Cell(NamedTuple):
    """One contender in one scenario, over the seeds."""

    seeds: int
    survived: int
    ended: str
    damage: float
    recovered: int | None
    false_positives: int
    wasted: float

    @property
    def has_survived(self) -> bool:
        """With every seed."""
        return self.survived == self.seeds


@dataclass
class Results:
    """All records, by what they are of."""

    records: dict[Key, Record]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, records: Iterable[Record], seeds: Sequence[int]) -> Results:
        """The last record of each run counts."""
        return cls({key(r): r for r in records}, tuple(seeds))

    def figures(self, contender: str, scenario: Scenario, seed: int) -> Figures | None:
        """Of one run; None if it, or what it is held against, was not made."""
        condition = scenario.condition
        name = scenario.name if scenario.strike is not None else FAULT_FREE
        record = self.records.get((contender, condition.name, name, seed))
        twin = condition.name if scenario.strike is not None else PLAIN.name
        reference = self.records.get((contender, twin, FAULT_FREE, seed))
        if record is None or reference is None:
            return None
        excess = [_held(a) - _held(b) for a, b in zip(record["losses"], reference["losses"], strict=False)]
        ended = record["ended"]
        after = condition.fault if scenario.legitimate else condition.fault + scenario.window
        unasked = [step for step in (*record["skips"], *record["rollbacks"]) if step >= after]
        if not scenario.legitimate:
            unasked = [step for step in unasked if _last(excess, step - condition.fault) < NEAR]
        earlier = 0 if scenario.strike is not None else sum(step < condition.fault for step in _interventions(record))
        damage = math.nan if ended else EVERY * sum(excess)
        before = self.records[contender, condition.name, FAULT_FREE, seed]
        healthy = sum(step < condition.fault for step in before["skips"])
        wasted = record["wasted"] - (healthy if scenario.strike is not None else 0)
        return Figures(ended, damage, _recovered(excess), len(unasked) + earlier, wasted)

    def cell(self, contender: str, scenario: Scenario) -> Cell | None:
        """Over the seeds; None if one is missing."""
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
        )

    def spread(self, scenario: Scenario) -> float:
        """Standard deviation over the seeds of the summed loss of the fault-free default stack, nats x steps."""
        sums = []
        for seed in self.seeds:
            record = self.records.get((DEFAULT, scenario.condition.name, FAULT_FREE, seed))
            if record is not None:
                sums.append(EVERY * sum(map(_held, record["losses"])))
        return statistics.stdev(sums) if len(sums) > 1 else math.nan


class Verdict(NamedTuple):
    """Whether the default stack keeps the rule in one scenario; strictly: without the spread of the seeds."""

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
        contenders: whom the default stack is held against, itself included.
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
    """What may stand against a damage: the largest of 1.15 times it, 2 above it, and two standard deviations."""
    return max(1.15 * damage, damage + 2.0, 0.0 if math.isnan(spread) else 2.0 * spread)


def key(record: Record) -> Key:
    """What a record is of."""
    return record["contender"], record["condition"], record["scenario"], record["seed"]


def _interventions(record: Record) -> list[int]:
    return [*record["skips"], *record["rollbacks"]]


def _held(loss: float | None) -> float:
    return CEILING if loss is None else min(loss, CEILING)


def _last(excess: Sequence[float], steps: int) -> float:
    place = min(steps // EVERY - 1, len(excess) - 1)
    return excess[place] if place >= 0 else math.inf


def _recovered(excess: Sequence[float]) -> int | None:
    """First measurement of three in a row near the reference, in steps from the fault."""
    for i in range(len(excess) - 2):
        if all(x < NEAR for x in excess[i : i + 3]):
            return EVERY * i
    return None
