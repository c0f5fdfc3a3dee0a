"""NaN and infinity at any position do not enter a rule's history."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from stabletrain.core.rule import Rule
from stabletrain.testing.checks.equality import nonfinite_numbers
from stabletrain.testing.checks.replaying import outcome_of, run
from stabletrain.testing.failure import wrong
from stabletrain.testing.series import calm
from stabletrain.testing.subject import Subject, choice

BAD: tuple[tuple[float | None, float | None], ...] = (
    (math.nan, None),
    (math.inf, None),
    (-math.inf, None),
    (None, math.nan),
    (None, math.inf),
    (math.nan, math.nan),
    (math.inf, math.inf),
)
"""Loss and norm of a bad step; None: the value of the healthy series."""

_STEPS = 150
_SPIKE = (1e4, 1e4)
"""Factors on loss and norm in a large spike."""


def state_stays_finite(subject: Subject) -> None:
    """After non-finite steps the state is finite, and a large spike is clipped or skipped as without them."""
    for option in subject.options:
        rule = subject.build(option)
        series = calm(_STEPS)
        clean = run(rule, series, rule.init())
        expected = _decision(rule, clean[-1].observation.state)
        expected_infinite = _infinite_paths(clean[-1].observation.state)
        for position, bad, skipped, repeats in _cases():
            healthy = series[min(position, _STEPS - 1)]
            loss, norm = (now if given is None else given for given, now in zip(bad, healthy, strict=True))
            state = clean[position - 1].observation.state if position else rule.init()
            for again in range(repeats):
                outcome = outcome_of(rule.limits(state), position + again, loss, norm, skipped=skipped)
                state = rule.observe(state, outcome).state
            rest = run(rule, series[position:], state, position + repeats)
            state = rest[-1].observation.state if rest else state
            case = (
                f"after loss={loss:.4g}, grad_norm={norm:.4g} at step {position}"
                f"{f', {repeats} times' if repeats > 1 else ''}{', skipped by another plugin' if skipped else ''}"
            )
            if bad_values := [each for each in nonfinite_numbers(state) if each.split("=")[0] not in expected_infinite]:
                wrong(f"a finite state of {choice(option)} {case}", ", ".join(bad_values[:3]))
            got = _decision(rule, state)
            if got[0] != expected[0] or not math.isclose(got[1], expected[1], rel_tol=0.05):
                wrong(
                    f"a large spike {case} to be treated as without: {_describe(expected)} ({choice(option)})",
                    _describe(got),
                )


def _cases() -> Iterator[tuple[int, tuple[float | None, float | None], bool, int]]:
    """Yield position, bad step, whether another plugin skips it, and how many times in a row it occurs."""
    both = (math.nan, math.nan)
    for position in range(_STEPS + 1):
        yield position, both, False, 1
    for position in (0, 1, 2, 5, 20, 49, 50, 51, 63, 64, 65, 100, _STEPS):
        for bad in BAD:
            for skipped in (False, True):
                yield position, bad, skipped, 1
        for bad in (both, (math.inf, math.inf)):
            yield position, bad, True, 7


def _decision(rule: Rule[Any], state: Any) -> tuple[bool, float]:
    limits = rule.limits(state)
    loss, norm = 2.0 * _SPIKE[0], _SPIKE[1]
    return limits.skips_step(loss, norm), limits.clip(norm)


def _describe(decision: tuple[bool, float]) -> str:
    return "step skipped" if decision[0] else f"norm {_SPIKE[1]:.4g} clipped to {decision[1]:.4g}"


def _infinite_paths(state: Any) -> set[str]:
    """Paths of infinite numbers in the state of a healthy history, such as a minimum of no values."""
    return {each.split("=")[0] for each in nonfinite_numbers(state) if not each.endswith("nan")}
