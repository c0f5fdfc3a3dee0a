"""A rule is a function of what it was given: the same twice, and the same after its state went through a file."""

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
from stabletrain.testing.series import HEALTHY, TROUBLED, Series
from stabletrain.testing.subject import Subject, choice


class Step(NamedTuple):
    """What a rule did at one step, the state after it included."""

    limits: Limits
    outcome: Outcome
    observation: Observation[Any]


def run(rule: Rule[Any], series: Iterable[tuple[float, float]], state: Any, start: int = 0) -> list[Step]:
    """Replay with the states kept.

    Args:
        rule: the rule.
        series: pairs of loss and raw gradient norm.
        state: where to begin.
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
    """The outcome of a step that is held to these limits alone, or that somebody else skips."""
    skipped = skipped or limits.skips_step(loss, norm)
    return Outcome(step, loss, norm, norm, float("nan") if skipped else limits.clip(norm), skipped=skipped)


def everywhere() -> dict[str, Series]:
    """All series that rules are tried on."""
    return {**HEALTHY, **TROUBLED}


def deterministic(subject: Subject) -> None:
    """Replaying twice, with the same rule and with another one, says the same; asking for limits changes nothing."""
    for option in subject.options:
        rule, other = subject.build(option), subject.build(option)
        for name, series in everywhere().items():
            first, again, fresh = (run(each, series, each.init()) for each in (rule, rule, other))
            for which, second in (("the same rule", again), ("a new rule", fresh)):
                if (step := _first_difference(first, second)) is not None:
                    wrong(
                        f"{choice(option)} to decide alike on every replay",
                        f"{which} differs at step {step} of the series {name!r}: a rule may keep nothing in itself, "
                        f"all history belongs in the state",
                    )
            state = first[-1].observation.state
            if not same(rule.limits(state), rule.limits(state)):
                wrong(f"{choice(option)}.limits to depend on the state alone", f"two answers at the end of {name!r}")


def resumes_at_any_cut(subject: Subject) -> None:
    """State -> plain -> JSON -> state is lossless, and a new rule goes on from it as the old one did."""
    for option in subject.options:
        rule = subject.build(option)
        for name, series in everywhere().items():
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
                            "a resumed rule to go on as the uninterrupted one",
                            f"another decision at step {cut + 1 + step} after a resume behind step {cut} {where}: "
                            f"something that matters is not in the state",
                        )


def state_is_plain(subject: Subject) -> None:
    """The state holds named tuples, tuples, numbers, strings and None, and agrees with its annotations."""
    for option in subject.options:
        rule = subject.build(option)
        steps = run(rule, TROUBLED["rough"], rule.init())
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
    """A state as a checkpoint returns it."""
    return from_plain(rule.state_type(), json.loads(json.dumps(to_plain(state))))


def _first_difference(first: list[Step], second: list[Step]) -> int | None:
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if one != other and not same(one, other):  # plain comparison first: it is fast, but NaN is not NaN
            return index
    return None
