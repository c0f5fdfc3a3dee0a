"""Replay of several rules together, as the guard decides with them; the series does not react to what is decided."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import stabletrain as st
from stabletrain.core.limits import join
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Replayed, Rule


def default_rules() -> list[Rule[Any]]:
    """The rules of the default stack."""
    return [callback.rule for callback in st.default_callbacks() if hasattr(callback, "rule")]


def replay_together(
    rules: Sequence[Rule[Any]], series: Iterable[tuple[float, float]], states: list[Any] | None = None
) -> Iterator[Replayed]:
    """Decide each step by the joined limits of all rules.

    Args:
        rules: the rules.
        series: pairs of loss and raw gradient norm, one for each attempted step.
        states: of the rules, which are updated in place; None: the initial ones.
    """
    states = [rule.init() for rule in rules] if states is None else states
    for step, (loss, norm) in enumerate(series):
        limits = join(rule.limits(state) for rule, state in zip(rules, states, strict=True))
        skipped = limits.skips_step(loss, norm)
        outcome = Outcome(step, loss, norm, norm, math.nan if skipped else limits.clip(norm), skipped=skipped)
        observed = [rule.observe(state, outcome) for rule, state in zip(rules, states, strict=True)]
        states[:] = [each.state for each in observed]
        events, requests = (sum((each[i] for each in observed), ()) for i in (1, 2))
        yield Replayed(outcome, events, requests)
