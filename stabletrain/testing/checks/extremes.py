"""With zero norms, huge and tiny values, negative losses and overflows a rule's limits are valid numbers."""

from __future__ import annotations

import math
from typing import Any

from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Rule
from stabletrain.testing.checks.equality import nonfinite_numbers
from stabletrain.testing.checks.replaying import outcome_of
from stabletrain.testing.failure import wrong
from stabletrain.testing.series import Series, calm
from stabletrain.testing.subject import Subject, choice

_VALUES = (0.0, 5e-324, 1e-300, 1e-30, 1e30, 1e154, 1e300, 1.7976931348623157e308)
_PROBES = (0.0, 1e-300, 1.0, 1e6, 1e308)


def extremes_do_not_crash(subject: Subject) -> None:
    """On extreme series `limits` and `observe` do not raise, the state has no NaN, and every limit is valid."""
    for option in subject.options:
        for name, series in _series().items():
            rule = subject.build(option)
            state = rule.init()
            for step, (loss, norm) in enumerate(series):
                case = f"{choice(option)} at step {step} of {name} (loss {loss:.4g}, grad_norm {norm:.4g})"
                try:
                    limits = rule.limits(state)
                    for probe in _PROBES:
                        clipped = limits.clip(probe)
                        if not 0.0 <= clipped <= probe:
                            wrong(f"{case} to bring a norm of {probe:g} into [0, {probe:g}]", f"{clipped:g}")
                    state = rule.observe(state, outcome_of(limits, step, loss, norm)).state
                    if rule.sees_overflow and step % 5 == 4:
                        state = rule.observe(state, _overflow(step)).state
                except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
                    wrong(f"no exception from {case}", f"{type(error).__name__}: {error}")
                if any(each.endswith("nan") for each in nonfinite_numbers(state)):
                    wrong(f"no NaN in the state of {case}", next(nonfinite_numbers(state)))
            _check_rebase(rule, state, f"{choice(option)} after {name}")


def _check_rebase(rule: Rule[Any], state: Any, case: str) -> None:
    try:
        rebased = rule.rebase(state, "rollback")
        rule.limits(rebased)
        rule.limits(rule.forget(state))
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
        wrong(f"no exception from rebase, forget and limits of {case}", f"{type(error).__name__}: {error}")


def _series() -> dict[str, Series]:
    usual = calm(80)
    found: dict[str, Series] = {"zero norms": [(2.0, 0.0)] * 120, "constants": [(2.0, 1.0)] * 120}
    for value in _VALUES:
        found[f"norms of {value:g}"] = [(2.0, value)] * 100
        found[f"a norm of {value:g} after calm"] = [*usual, (2.0, value), *usual[:5]]
        found[f"losses of {value:g} and {-value:g}"] = [(value if t % 2 else -value, 1.0) for t in range(100)]
    found["all extremes"] = [
        (loss, norm) for _ in range(8) for loss in (0.0, -1e300, 1e300) for norm in (*_VALUES, math.nan, math.inf)
    ]
    return found


def _overflow(step: int) -> Outcome:
    return Outcome(
        step, 2.0, math.inf, math.inf, math.nan, overflow=True, loss_scale=2.0**-24, overflows_in_a_row=step + 1
    )
