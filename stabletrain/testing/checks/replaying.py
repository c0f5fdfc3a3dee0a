"""A rule is deterministic, and resumes from a state that was written to JSON and read back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from stabletrain.core.limits import Limits
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule
from stabletrain.core.state import from_plain, to_plain
from stabletrain.testing.checks.equality import same
from stabletrain.testing.failure import wrong
from stabletrain.testing.series import FAULTY, HEALTHY, Series
from stabletrain.testing.subject import Subject, choice


class Step(NamedTuple):
    """A rule's limits, outcome and observation at one step; the observation has the new state."""

    limits: Limits
    outcome: Outcome
    observation: Observation[Any]


def run(rule: Rule[Any], series: Iterable[tuple[float, float]], state: Any, start: int = 0) -> list[Step]:
    """Replay a series, and return every step with its state.

    Args:
        rule: the rule.
        series: pairs of loss and raw gradient norm.
        state: the state before the first step.
        start: number of the first attempted step.
    """
    steps = []
    for step, (loss, norm) in enumerate(series, start):
        limits = rule.limits(state)
        outcome = outcome_of(limits, step, loss, norm)
        observation = rule.observe(state, outcome)
        state = observation.state
        steps.append(Step(limits, outcome, observation))
    return steps


def outcome_of(limits: Limits, step: int, loss: float, norm: float, *, skipped: bool = False) -> Outcome:
    """Return the outcome of a step under these limits alone; with ``skipped``, of one that another plugin skips."""
    skipped = skipped or limits.skips_step(loss, norm)
    return Outcome(step, loss, norm, norm, float("nan") if skipped else limits.clip(norm), skipped=skipped)


def all_series() -> dict[str, Series]:
    """Return all series that rules are tested on, by name."""
    return {**HEALTHY, **FAULTY}


def is_deterministic(subject: Subject) -> None:
    """Two replays, with the same rule object and with a new one, are equal; calling `limits` changes nothing."""
    for option in subject.options:
        rule, other = subject.build(option), subject.build(option)
        for name, series in all_series().items():
            first, again, fresh = (run(each, series, each.init()) for each in (rule, rule, other))
            for which, second in (("the same rule", again), ("a new rule", fresh)):
                if (step := _first_difference(first, second)) is not None:
                    wrong(
                        f"{choice(option)} to give the same results on every replay",
                        f"{which} differs at step {step} of the series {name!r}: a rule must not change itself, all "
                        f"history belongs in the state",
                    )
            state = first[-1].observation.state
            if not same(rule.limits(state), rule.limits(state)):
                wrong(f"{choice(option)}.limits to depend on the state alone", f"two results at the end of {name!r}")


def resumes_from_any_state(subject: Subject) -> None:
    """State -> plain -> JSON -> state is lossless, and a new rule object continues from it like the old one."""
    for option in subject.options:
        rule = subject.build(option)
        for name, series in all_series().items():
            steps = run(rule, series, rule.init())
            where = f"of the series {name!r} with {choice(option)}"
            for cut in range(0, len(steps), 1 if name == "rough" else 23):
                state = steps[cut].observation.state
                restored = through_json(rule, state)
                if state != restored and not same(state, restored):
                    wrong(f"the state to survive a checkpoint (step {cut} {where})", f"{restored!r} for {state!r}")
                if cut % 23 == 0:
                    rest = run(subject.build(option), series[cut + 1 :], restored, cut + 1)
                    if (step := _first_difference(steps[cut + 1 :], rest)) is not None:
                        wrong(
                            "a resumed rule to decide like the uninterrupted one",
                            f"another decision at step {cut + 1 + step} after a resume after step {cut} {where}: "
                            f"the state is incomplete",
                        )


def state_is_plain(subject: Subject) -> None:
    """The state consists of named tuples, tuples, numbers, strings and None, as annotated."""
    for option in subject.options:
        rule = subject.build(option)
        steps = run(rule, FAULTY["rough"], rule.init())
        for state in (rule.init(), *(step.observation.state for step in steps)):
            try:
                to_plain(state)
            except TypeError as error:
                wrong(f"the state of {choice(option)} to be plain", str(error))
            try:
                through_json(rule, state)
            except Exception as error:
                wrong(
                    f"the state of {choice(option)} to be restored by its annotations",
                    f"{type(error).__name__}: {error}",
                )


def through_json(rule: Rule[Any], state: Any) -> Any:
    """Return a state after a round trip through JSON, as in a checkpoint."""
    return from_plain(rule.state_type(), json.loads(json.dumps(to_plain(state))))


def _first_difference(first: list[Step], second: list[Step]) -> int | None:
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if one != other and not same(one, other):  # == first, which is fast but finds NaN != NaN
            return index
    return None
