"""What the default stack is meant to reach, each with its value and whether it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fault_suite import other_faults as other
from fault_suite.contenders import CONTENDERS, DEFAULT, NOTHING
from fault_suite.healthy_runs import HEALTHY_RUNS
from fault_suite.judge import Results
from fault_suite.scenarios import HEALTHY, SCENARIOS, Scenario
from fault_suite.trial import Record

BEFORE = {
    "random tokens x1": 0.3,
    "random tokens x10": 2.2,
    "shuffled labels x10": 2.2,
    "constant token x10": 2.2,
    "rare token x10": 2.2,
    "gradient x100": 0.3,
    "NaN gradient": 0.3,
    "Inf gradient": 0.3,
    "NaN loss": 0.3,
    "flipped bit: weight x2^128": 5.7,
    "corrupted weight: 1 -> 100": 5.7,
    "learning rate x30, 20 steps": 12.9,
    "fp16 overflow x3": 0.4,
    "level shift: sequences x4": -0.2,
    "level shift: batches / 4": 22.9,
    "healthy, long-tailed": 35.1,
}
"""Damage with the default stack before it tolerated single outliers, which applies them; seeds 0, 1, 2."""
MORE = 1.5
"""Damage that tolerating may add in each row, nats x steps."""
CORRUPTED = "corrupted weight: 1 -> 100"
LIMITS: dict[str, float] = {
    CORRUPTED: 4.0,
    "at 20: gradient x1000": 15.0,
    "at 45: gradient x1000": 5.0,
    other.SHARD.name: 25.0,
    other.TWO_BURSTS.name: 6.0,
    **{each.name: 12.0 for each in other.INTERLEAVED},
}
"""Largest damage in single rows, nats x steps."""
NO_WORSE = tuple(f"at {at}: {what}" for at in (20, 45) for what in ("random tokens x10", "corrupted weight"))
"""Rows with a damage no larger than without protection: so early, content cannot be judged."""
OF_BEST, OF_FP32 = 0.03, 1.1
DROPPED = 1


class Reach(NamedTuple):
    """One aim; ``holds`` is None if it was not measured."""

    what: str
    value: str
    reach: str
    holds: bool | None


def reaches(results: Results, healthy: Sequence[Record]) -> list[Reach]:
    """Return all aims with their values.

    Args:
        results: all records.
        healthy: records of the long healthy runs.
    """
    return [
        _of_best(results),
        _survives("survives the faults of the first table", results, SCENARIOS),
        _survives("survives the other faults", results, other.OTHER_FAULTS),
        *_damages(results),
        _fp16(results),
        *_undisturbed(healthy),
    ]


def _of_best(results: Results) -> Reach:
    what, reach = "held-out loss without a fault", f"at most {OF_BEST:g} above the best contender's"
    losses = {}
    for each in CONTENDERS:
        cell = results.cell(each.name, HEALTHY)
        if cell is not None and cell.has_survived:
            losses[each.name] = cell.loss
    if DEFAULT not in losses or len(losses) == 1:
        return Reach(what, "", reach, None)
    best = min(losses, key=lambda name: losses[name])
    above = losses[DEFAULT] - losses[best]
    return Reach(what, f"{losses[DEFAULT]:.3f}, {above:.3f} above {best}", reach, above <= OF_BEST)


def _survives(what: str, results: Results, scenarios: Sequence[Scenario]) -> Reach:
    cells = {each.name: results.cell(DEFAULT, each) for each in scenarios}
    ended = [f"{name}: {cell.ended}" for name, cell in cells.items() if cell is not None and not cell.has_survived]
    missing = sum(cell is None for cell in cells.values())
    value = "; ".join(ended) or (f"{len(cells) - missing} of {len(cells)} rows run" if missing else "all")
    return Reach(what, value, f"all {len(cells)} rows", False if ended else (None if missing else True))


def _damages(results: Results) -> Iterator[Reach]:
    for scenario in (*SCENARIOS, *other.OTHER_FAULTS):
        name = scenario.name
        cell, bare = results.cell(DEFAULT, scenario), results.cell(NOTHING, scenario)
        damage = None if cell is None else (cell.damage if cell.has_survived else math.inf)
        if name in BEFORE:
            limit = BEFORE[name] + MORE
            yield _at_most(f"{name}: damage", damage, limit, f"at most {limit:.1f}: {MORE:g} above {BEFORE[name]:g}")
        if name in LIMITS:
            yield _at_most(f"{name}: damage", damage, LIMITS[name], f"at most {LIMITS[name]:g}")
        if name in NO_WORSE:
            limit = math.nan if bare is None else (bare.damage if bare.has_survived else math.inf)
            shown = "" if math.isnan(limit) else f" {limit:.1f}"
            yield _at_most(f"{name}: damage", damage, limit, f"at most that without protection,{shown}".rstrip(","))


def _at_most(what: str, value: float | None, limit: float, reach: str) -> Reach:
    if value is None or math.isnan(limit):
        return Reach(what, "", reach, None)
    return Reach(what, f"{value:.1f}" if math.isfinite(value) else "did not survive", reach, value <= limit)


def _fp16(results: Results) -> Reach:
    what = "fp16, NaN gradient in every 5th batch: held-out loss"
    half, full = results.cell(DEFAULT, other.NAN_REPEATED_HALF), results.cell(DEFAULT, other.NAN_REPEATED)
    if half is None or full is None:
        return Reach(what, "", f"completes, at most {OF_FP32:g} times that in fp32", None)
    reach = f"completes, at most {OF_FP32:g} times the {full.loss:.3f} in fp32"
    if not half.has_survived:
        return Reach(what, half.ended, reach, False)
    return Reach(what, f"{half.loss:.3f}", reach, half.loss <= OF_FP32 * full.loss)


def _undisturbed(healthy: Sequence[Record]) -> Iterator[Reach]:
    found = {(each["condition"], each["seed"]): each for each in healthy if each["contender"] == DEFAULT}
    for condition, seed, _ in HEALTHY_RUNS:
        what, reach = f"{condition.name}, seed {seed}", f"completes, 0 rollbacks, at most {DROPPED} dropped step"
        record = found.get((condition.name, seed))
        if record is None:
            yield Reach(what, "", reach, None)
            continue
        dropped, back = len(record["skips"]), len(record["rollbacks"])
        value = record["ended"] or f"{back} rollbacks, {dropped} dropped"
        yield Reach(what, value, reach, not record["ended"] and not back and dropped <= DROPPED)


def table(found: Sequence[Reach]) -> str:
    """Return the aims as a table in Markdown."""
    words = {True: "yes", False: "**no**", None: "not run"}
    lines = ["| default stack | value | reach | holds |", "|---|---|---|---|"]
    lines += [f"| {each.what} | {each.value} | {each.reach} | {words[each.holds]} |" for each in found]
    return "\n".join(lines)
