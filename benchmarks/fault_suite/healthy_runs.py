"""Long runs without a fault, in which the default stack should do nothing."""

from __future__ import annotations

from dataclasses import replace

from fault_suite.injected import SetAttribute
from fault_suite.scenarios import BATCH, Condition, Scenario

STEPS = 2000
PLAIN = Condition("2,000 steps", fault=STEPS, steps=STEPS, clean=True)
LONG_TAILED = replace(PLAIN, name="2,000 steps, long-tailed", long_tailed=True)
SHIFT = replace(PLAIN, name="2,000 steps, batches / 4 from 1,000")
_QUARTER = Scenario("level shift", 1, lambda at, seed: SetAttribute(STEPS // 2, "rows", BATCH // 4))

HEALTHY_RUNS: tuple[tuple[Condition, int, Scenario | None], ...] = (
    (PLAIN, 20, None),
    (PLAIN, 21, None),
    *((LONG_TAILED, seed, None) for seed in (22, *range(30, 37))),
    (SHIFT, 23, _QUARTER),
)
"""Condition, seed, and a planned legitimate change or None. Nothing is measured but skips and rollbacks."""
