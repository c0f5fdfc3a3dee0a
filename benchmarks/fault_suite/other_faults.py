"""Faults at other times and of other kinds: early, interleaved, twice, for good, long, or in a part of a step."""

from __future__ import annotations

import math

from fault_suite.injected import BadShard, SetWeight, every, only, share
from fault_suite.scenarios import PLAIN, Condition, Scenario
from stabletrain import chaos

EARLY, SOON = Condition("early", fault=20, steps=140), Condition("soon", fault=45, steps=165)
LONG = Condition("long", fault=190, steps=480)
ACCUMULATED = Condition("accumulated", fault=120, steps=200, accumulate=4)
FAST = Condition("learning rate x3", fault=300, steps=500, rate=3e-2)
REPEATED = Condition("repeated", fault=20, steps=270)
REPEATED_HALF = Condition("repeated, fp16", fault=20, steps=270, fp16=True)
VOCABULARY = 84
_FOR_GOOD = PLAIN.steps - PLAIN.fault


def _random(at: int, steps: int, seed: int) -> chaos.BadBatch:
    return chaos.BadBatch(at, "random", steps, vocabulary=VOCABULARY, seed=seed)


def _shuffled(at: int, steps: int, seed: int) -> chaos.BadBatch:
    return chaos.BadBatch(at, "shuffled_labels", steps, seed=seed)


def _early(condition: Condition) -> tuple[Scenario, ...]:
    at = condition.fault
    return (
        Scenario(f"at {at}: random tokens x10", 10, lambda at, seed: _random(at, 10, seed), condition),
        Scenario(f"at {at}: gradient x1000", 1, lambda at, seed: chaos.ScaledGradient(at, 1000.0), condition),
        Scenario(f"at {at}: corrupted weight", 1, lambda at, seed: SetWeight(at, "net.norm.weight", 100.0), condition),
    )


def _fifth_gradient(name: str, condition: Condition) -> Scenario:
    steps = condition.steps - condition.fault
    return Scenario(
        name,
        steps,
        lambda at, seed: only(chaos.BadGradient(at, math.nan, steps=steps, seed=seed), every(5)),
        condition,
        figure="loss",
    )


INTERLEAVED = (
    Scenario("random tokens, every 2nd of 60", 60, lambda at, seed: only(_random(at, 60, seed), every(2))),
    Scenario("shuffled labels, every 2nd of 60", 60, lambda at, seed: only(_shuffled(at, 60, seed), every(2))),
    Scenario("random tokens, every 3rd of 60", 60, lambda at, seed: only(_random(at, 60, seed), every(3))),
)
TWO_BURSTS = Scenario(
    "random tokens x10, twice, 60 apart",
    70,
    lambda at, seed: only(_random(at, 70, seed), lambda step, micro: step < 10 or step >= 60),
)
SHARD = Scenario(
    "bad shard of 60, random",
    60,
    lambda at, seed: BadShard(at, "random", 60, vocabulary=VOCABULARY, seed=seed),
    LONG,
)
NAN_REPEATED = _fifth_gradient("NaN gradient, every 5th of 250: loss", REPEATED)
NAN_REPEATED_HALF = _fifth_gradient("fp16, NaN gradient, every 5th of 250: loss", REPEATED_HALF)

OTHER_FAULTS = (
    *_early(EARLY),
    *_early(SOON),
    *INTERLEAVED,
    TWO_BURSTS,
    Scenario(
        "30 % of steps with shuffled labels, for good",
        _FOR_GOOD,
        lambda at, seed: only(_shuffled(at, _FOR_GOOD, seed), share(0.3, seed)),
    ),
    Scenario(
        "10 % of steps with random tokens, for good",
        _FOR_GOOD,
        lambda at, seed: only(_random(at, _FOR_GOOD, seed), share(0.1, seed)),
    ),
    SHARD,
    Scenario(
        "bad shard of 200, random",
        200,
        lambda at, seed: BadShard(at, "random", 200, vocabulary=VOCABULARY, seed=seed),
        LONG,
    ),
    Scenario("bad shard of 200, shuffled", 200, lambda at, seed: BadShard(at, "shuffled_labels", 200, seed=seed), LONG),
    Scenario(
        "1 of 4 micro-batches random, x10",
        10,
        lambda at, seed: only(_random(at, 10, seed), lambda step, micro: micro == 1),
        ACCUMULATED,
    ),
    Scenario(
        "1 of 4 micro-batches NaN, x3",
        3,
        lambda at, seed: only(chaos.ScaledLoss(at, math.nan, 3), lambda step, micro: micro == 1),
        ACCUMULATED,
    ),
    NAN_REPEATED,
    NAN_REPEATED_HALF,
    Scenario("learning rate x3 from the start: loss", FAST.steps, None, FAST, figure="loss"),
)
OTHER_CONDITIONS = (EARLY, SOON, LONG, ACCUMULATED, REPEATED, REPEATED_HALF, FAST)
