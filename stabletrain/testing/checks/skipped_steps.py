"""A step that another plugin skipped does not enter a rule's statistics."""

from __future__ import annotations

from stabletrain.testing.checks.equality import same
from stabletrain.testing.checks.replaying import outcome_of, run
from stabletrain.testing.failure import wrong
from stabletrain.testing.series import calm
from stabletrain.testing.subject import Subject, choice


def skips_by_others_are_ignored(subject: Subject) -> None:
    """A step that the rule would have applied and another plugin skipped does not change the rule's limits.

    A rule may use the steps that it skips itself, for example to learn a new level from them.
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
