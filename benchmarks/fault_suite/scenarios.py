"""Conditions (healthy runs) and scenarios (a fault at a known step of a condition)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from fault_suite.injected import SetAttribute, SetWeight
from stabletrain import chaos

LENGTH = 32
"""Number of characters in a training sequence; in one of the level shifts it increases fourfold."""
BATCH = 16
RATE, LR_WARMUP = 1e-2, 20
"""Learning rate, and the number of steps of its linear warm-up."""


@dataclass(frozen=True)
class Condition:
    """A healthy run, and the step at which faults are applied.

    Args:
        name: of the condition.
        fault: attempted step at which faults are applied, from 0.
        steps: length of the run, in attempted steps.
        fp16: half precision with a loss scaler.
        long_tailed: the batch size of each step is log-normal, as if samples were packed by length.
        clean: use the text without its rows of underscores: a window within such a row has a loss of 15 to 20 nats, so
            it is not healthy data.
        rate: learning rate after the warm-up.
        accumulate: micro-batches per optimizer step; ``fault`` and ``steps`` count steps.
    """

    name: str
    fault: int = 190
    steps: int = 350
    fp16: bool = False
    long_tailed: bool = False
    clean: bool = False
    rate: float = RATE
    accumulate: int = 1

    def trainer_options(self) -> dict[str, Any]:
        """Trainer arguments of this condition."""
        options: dict[str, Any] = {"accumulate_grad_batches": self.accumulate}
        if self.fp16:
            # with precision="16-mixed" Lightning silently uses bfloat16 on the CPU
            options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]
        return options


PLAIN = Condition("fp32")
HALF = Condition("fp16", fault=110, steps=210, fp16=True)
LONG_TAILED = Condition("long-tailed", long_tailed=True)


@dataclass(frozen=True)
class Scenario:
    """A fault or change in a run of a condition.

    Args:
        name: name in the table.
        window: number of attempted steps with the fault.
        make_fault: makes the fault from its first step and the seed; None: no fault.
        condition: the healthy run.
        legitimate: the change is not a fault, so any intervention is a false positive.
        figure: what the table shows: the damage, or the held-out loss at the end, for which no twin is trained.
    """

    name: str
    window: int
    make_fault: Callable[[int, int], chaos.Fault] | None
    condition: Condition = PLAIN
    legitimate: bool = False
    figure: Literal["damage", "loss"] = "damage"


_MLP = "net.blocks.0.mlp.0.weight"

SCENARIOS = (
    Scenario("random tokens x1", 1, lambda at, seed: chaos.BadBatch(at, "random", vocabulary=84, seed=seed)),
    Scenario("random tokens x10", 10, lambda at, seed: chaos.BadBatch(at, "random", 10, vocabulary=84, seed=seed)),
    Scenario("shuffled labels x10", 10, lambda at, seed: chaos.BadBatch(at, "shuffled_labels", 10, seed=seed)),
    Scenario("constant token x10", 10, lambda at, seed: chaos.BadBatch(at, "constant", 10)),
    Scenario("rare token x10", 10, lambda at, seed: chaos.BadBatch(at, "rare", 10)),
    Scenario("gradient x100", 1, lambda at, seed: chaos.ScaledGradient(at, 100.0)),
    Scenario("NaN gradient", 1, lambda at, seed: chaos.BadGradient(at, math.nan, seed=seed)),
    Scenario("Inf gradient", 1, lambda at, seed: chaos.BadGradient(at, math.inf, seed=seed)),
    Scenario("NaN loss", 1, lambda at, seed: chaos.ScaledLoss(at, math.nan)),
    Scenario("flipped bit: weight x2^128", 1, lambda at, seed: chaos.FlipWeightBit(at, _MLP, seed=seed)),
    Scenario("corrupted weight: 1 -> 100", 1, lambda at, seed: SetWeight(at, "net.norm.weight", 100.0)),
    Scenario("learning rate x30, 20 steps", 20, lambda at, seed: chaos.LearningRateSurge(at, 30.0, 20)),
    Scenario("fp16 overflow x3", 3, lambda at, seed: chaos.ScaledLoss(at, 1e4, 3), HALF),
    Scenario("level shift: sequences x4", 1, lambda at, seed: SetAttribute(at, "length", 4 * LENGTH), legitimate=True),
    Scenario("level shift: batches / 4", 1, lambda at, seed: SetAttribute(at, "rows", BATCH // 4), legitimate=True),
    Scenario("healthy, long-tailed", 1, None, LONG_TAILED, legitimate=True),
)
HEALTHY = Scenario("no fault: held-out loss at the end", 1, None, legitimate=True, figure="loss")
"""Row with the price of a protection that has nothing to do."""
CONDITIONS = (PLAIN, HALF, LONG_TAILED)
FAULT_FREE = "fault-free"
"""Scenario name of a condition's own run, which is the twin of its scenarios."""
