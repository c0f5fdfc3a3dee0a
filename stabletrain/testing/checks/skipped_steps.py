"""A step that somebody else skipped never happened: it enters no statistic."""

from __future__ import annotations

from stabletrain.testing.checks.equality import same
from stabletrain.testing.checks.replaying import outcome_of, run
from stabletrain.testing.failure import wrong
from stabletrain.testing.series import calm
from stabletrain.testing.subject import Subject, choice


def foreign_skips_are_not_learned(subject: Subject) -> None:
    """Limits do not move by a step that the rule itself would have applied and another plugin dropped.

    What a rule does about steps that it skips itself, such as learning a new level from them, is its own business.
    """
    series = calm(150)
    for option in subject.options:
        rule = subject.build(option)
        steps = run(rule, series, rule.init())
        for position in (0, 1, 10, 49, 50, 63, 64, 100, 149):
            state = steps[position].observation.state
            limits = rule.limits(state)
            for loss, norm in ((2.0, 1.1), (2.1, 1.5), (1.0, 0.2)):
                if limits.skips_step(loss, norm):
                    continue
                outcome = outcome_of(limits, position + 1, loss, norm, skipped=True)
                after = rule.limits(rule.observe(state, outcome).state)
                if not same(limits, after):
                    wrong(
                        f"{choice(option)} to ignore a step skipped by another plugin (outcome.applied is False; "
                        f"loss {loss}, grad_norm {norm}, after step {position})",
                        f"limits {after} instead of {limits}",
                    )
