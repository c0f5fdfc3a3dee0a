"""Over how many micro-batches a gradient is accumulated at each step: a pure function of the number of applied steps.

It depends on nothing else, so a resumed or rolled back run has the windows of an uninterrupted one, and a dropped step
is a step never seen here, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stabletrain.core.lengths import Length
from stabletrain.errors import UserError


class Stage(NamedTuple):
    """A part of the run in which all windows are equally large.

    Args:
        step: its first step, in applied optimizer steps.
        size: micro-batches in a window, >= 1.
    """

    step: int
    size: int


Plan = tuple[Stage, ...]
"""The stages of a run in order; the first begins at step 0."""


def plan(sizes: Iterable[tuple[Length, int]], tokens_per_batch: int | None, name: str) -> Plan:
    """Turn positions in steps or tokens into stages.

    A position in tokens is the first step before which so many tokens were seen, all windows counted as full.

    Args:
        sizes: from which position on a window has how many micro-batches.
        tokens_per_batch: in one micro-batch, over all ranks; None: unknown.
        name: the config key, for messages.

    Raises:
        UserError: if there is no stage at 0, or two at one step, or a position is in epochs or a share of the run.

    >>> plan([(Length(0), 1), (Length(1000, "tokens"), 4)], 100, "schedule")
    (Stage(step=0, size=1), Stage(step=10, size=4))
    """
    found: list[Stage] = []
    tokens = 0
    ordered = sorted(sizes, key=lambda each: each[0].value)
    if len({length.unit for length, _ in ordered if length.value}) > 1:
        raise UserError(f"{name}: expected all positions in steps or all in tokens, got both")
    for length, size in ordered:
        if length.unit not in ("steps", "tokens"):
            raise UserError(
                f"{name}: expected positions in applied steps (500) or tokens ('1e9tok'), got {length}. For epochs "
                "there is Lightning's GradientAccumulationScheduler"
            )
        step = int(length.value)
        if length.unit == "tokens" and length.value:
            if tokens_per_batch is None:
                raise UserError(f"{name}: {length} needs the number of tokens in a micro-batch: give tokens_per_sample")
            last = found[-1] if found else Stage(0, 1)
            more = math.ceil((length.value - tokens) / (last.size * tokens_per_batch))
            step = last.step + more
            tokens += more * last.size * tokens_per_batch
        if found and step == found[-1].step:
            raise UserError(f"{name}: expected one size at each position, got two at step {step}")
        found.append(Stage(step, size))
    if not found or found[0].step:
        raise UserError(f"{name}: expected a size from the start, such as {{0: 1}}, got none at 0")
    return tuple(found)


def size_at(stages: Plan, step: int) -> int:
    """The micro-batches in the window of a step.

    >>> size_at((Stage(0, 1), Stage(10, 4)), 9), size_at((Stage(0, 1), Stage(10, 4)), 10)
    (1, 4)
    """
    return next(stage.size for stage in reversed(stages) if stage.step <= max(step, 0))


def steps_in_epochs(stages: Plan, batches: Sequence[int]) -> list[int]:
    """The steps in each epoch; the optimizer also steps after an epoch's last batch.

    Args:
        stages: of the run.
        batches: micro-batches in each epoch.

    >>> steps_in_epochs((Stage(0, 1), Stage(2, 4)), [7, 7])
    [4, 2]
    """
    counts: list[int] = []
    step = 0
    for left in batches:
        first = step
        while left > 0:
            size = size_at(stages, step)
            ends = next((stage.step for stage in stages if stage.step > step), None)
            steps = math.ceil(left / size) if ends is None else min(math.ceil(left / size), ends - step)
            step, left = step + steps, left - steps * size
        counts.append(step - first)
    return counts


def micro_batches(target: int, per_micro_batch: int, what: str, name: str) -> int:
    """How many micro-batches have so many samples, or tokens.

    Args:
        target: of a step, over all ranks.
        per_micro_batch: over all ranks.
        what: ``"samples"`` or ``"tokens"``.
        name: the config key, for messages.

    Raises:
        UserError: if it is not a multiple; the message names the nearest ones.

    >>> micro_batches(64, 16, "samples", "target_samples")
    4
    """
    if target % per_micro_batch == 0:
        return target // per_micro_batch
    below = target // per_micro_batch * per_micro_batch
    near = [str(each) for each in (below, below + per_micro_batch) if each]
    raise UserError(
        f"{name}: expected a multiple of {per_micro_batch}, the {what} in one micro-batch of all ranks, got {target}. "
        f"Nearest: {' or '.join(near)}"
    )
