"""What can be found in a recorded run: a table of rules with their thresholds, what to try, and where they come from.

A finding is a hint and no diagnosis: each rule is a threshold on the recorded loss, gradient norm and learning rate.
docs/findings.md is generated from the table, `RULES`. In its words, a median is one of 1/50 of the steps, the noise is
the robust standard deviation of one median, and the gain is first loss - best median.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stabletrain.tracking import finding_rules as rules
from stabletrain.tracking.finding_rules import Found
from stabletrain.tracking.series import Curve, Series

SHOWN = 3
"""Findings that are shown, at most."""


class FindingRule(NamedTuple):
    """A rule, as a row of the table.

    Args:
        name: what it finds.
        threshold: in words.
        advice: what to try.
        source: where threshold or advice come from.
        find: the rule; a curve of None is one of too few points.
    """

    name: str
    threshold: str
    advice: str
    source: str
    find: Callable[[Series, Curve | None], Found | None]


class Finding(NamedTuple):
    """A finding, in words.

    Args:
        name: of the rule.
        text: the numbers.
        advice: what to try.
        source: of the rule.
        step: where it begins or is seen; None: in the whole run.
    """

    name: str
    text: str
    advice: str
    source: str
    step: int | None = None

    @property
    def sentence(self) -> str:
        """Name, numbers and advice in one line."""
        return f"{self.name}: {self.text}; try: {self.advice}"


RULES: tuple[FindingRule, ...] = (
    FindingRule(
        "diverged",
        "the end above the best by half the gain, 2 % of the first loss and 6 noise, or no finite loss at the end",
        "a third of the learning rate, a longer warm-up, plugins/spike=rollback",
        "Wortsman et al. 2023; Chowdhery et al. 2022",
        rules.diverged,
    ),
    FindingRule(
        "non-finite often",
        "a non-finite loss or norm in more than 1 % of the steps, fp16 overflows not counted",
        "another precision, then the batches that events.jsonl names",
        "Micikevicius et al. 2018",
        rules.nonfinite_often,
    ),
    FindingRule(
        "did not learn",
        "gain below 2 % of the first loss or 3 noise",
        "stabletrain lr-range, then the data and the labels",
        "Smith 2017",
        rules.did_not_learn,
    ),
    FindingRule(
        "rises at the start",
        "two medians in a row in the first fifth above the first loss by 20 % and 3 noise (of a median, or of the "
        "first loss)",
        "a longer warm-up, a lower learning rate",
        "Gilmer et al. 2021",
        rules.rises_at_the_start,
    ),
    FindingRule(
        "rollbacks in one place",
        "two that left out the same batches",
        "look at the data of these batches; if the loss differs each time, a lower learning rate",
        "Chowdhery et al. 2022",
        rules.rollbacks_in_one_place,
    ),
    FindingRule(
        "gradients grow",
        "median norm of the last tenth above 10 times that of 10 to 30 % of the run",
        "weight decay, plugins/clip=zscore, a lower learning rate",
        "Pascanu et al. 2013",
        rules.gradients_grow,
    ),
    FindingRule(
        "vanishing",
        "gradient of the first layer (root mean square) below 0.001 of that of the largest",
        "normalisation layers, another initialisation, residual connections",
        "Glorot and Bengio 2010",
        rules.vanishing,
    ),
    FindingRule(
        "overfitting",
        "validation loss at the end 5 % above its best, by 5 % of its fall and 3 sigma of its noise, for three "
        "validations, while the training loss falls",
        "stop at the step that is named, or regularise",
        "Prechelt 1998 (GL 5)",
        rules.overfitting,
    ),
    FindingRule(
        "spiky",
        "at least 3 steps and 0.5 % with a loss 6 robust sigma above the median of the 128 before, also if the loss is "
        "log-normal",
        "plugins/outliers=skip, a longer warm-up, a larger epsilon of the optimizer",
        "the spike score of OLMo",
        rules.spiky,
    ),
    FindingRule(
        "skips in one place",
        "at least 5, of which 80 % lie within 5 % of the run",
        "look at the data of the steps that are named",
        "OLMo 2 (2025)",
        rules.skips_in_one_place,
    ),
    FindingRule(
        "skips many",
        "at least 5 steps and more than 1 % dropped by rules",
        "the thresholds of the rule that dropped them (stabletrain replay), then the data",
        "OLMo 2 (2025)",
        rules.skips_many,
    ),
    FindingRule(
        "scale collapsed",
        "fp16 loss scale below 1 at the end",
        "precision=bf16_mixed",
        "Micikevicius et al. 2018",
        rules.scale_collapsed,
    ),
    FindingRule(
        "overflows",
        "at least 5 steps and more than 5 % dropped by the fp16 loss scaler",
        "precision=bf16_mixed",
        "Micikevicius et al. 2018",
        rules.overflows,
    ),
    FindingRule(
        "clipped always",
        "more than half of the steps after the learning rate's warm-up",
        "a lower learning rate, or bound the norm at its 90th percentile, which is given",
        "tuning playbook (Godbole et al. 2023)",
        rules.clipped_always,
    ),
    FindingRule(
        "rate at its end early",
        "minimum of a gradual decay reached with more than a tenth of the run left",
        "schedule.total=null, so that the decay is as long as the run",
        "Defazio et al. 2023",
        rules.rate_ends_early,
    ),
    FindingRule(
        "plateau",
        "gain of the last 30 % below 0.5 % of the gain or 2 standard errors, rate above half its peak throughout",
        "lower the rate now, a larger batch, a larger model",
        "tuning playbook (Godbole et al. 2023)",
        rules.plateau,
    ),
    FindingRule(
        "still improving",
        "last tenth better by 4 standard errors and 2 % of the gain, rate above half its peak",
        "train longer, lower the rate towards the end, or raise it",
        "tuning playbook (Godbole et al. 2023)",
        rules.still_improving,
    ),
    FindingRule(
        "clipped never",
        "a fixed bound that has clipped none of at least 1,000 steps",
        "nothing, since it does no harm; a bound that acts is the 90th percentile, which is given",
        "tuning playbook (Godbole et al. 2023)",
        rules.clipped_never,
    ),
)
"""All rules, the worst first."""


@np.errstate(all="ignore")  # a loss of any size is one: 1e308 twice is infinity
def findings(series: Series) -> list[Finding]:
    """Return all findings in a run, the worst first; none in a run of less than 100 steps.

    Args:
        series: the recorded run.
    """
    if not series.is_long_enough:
        return []
    found = []
    for rule in RULES:
        seen = rule.find(series, series.curve)
        if seen is not None:
            found.append(Finding(rule.name, seen.text, seen.advice or rule.advice, rule.source, seen.step))
    return found


def sentence(series: Series) -> str | None:
    """Return the one thing about a run that matters, in a line; None if nothing does.

    Args:
        series: what the run has recorded.
    """
    found = [each for each in findings(series) if each.name != "clipped never"]
    if found:
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        return f"{found[0].sentence}{more}"
    parts = []
    if series.rollbacks:
        where = "at step" if len(series.rollbacks) == 1 else "the last at step"
        parts.append(f"{_many(len(series.rollbacks), 'rollback')}, {where} {series.rollbacks[-1].step}")
    if series.skipped is not None and (skipped := round(float(series.skipped.sum()))):
        parts.append(f"{_many(skipped, 'step')} skipped")
    return "; ".join(parts) or None


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


OUTCOMES = (
    ("failed", "an exception or a mistake in the config ended it"),
    ("killed", "a signal ended it, or its process died"),
    ("stopped", "a plugin stopped it"),
    (
        "diverged",
        "the loss is not finite at the end, or the finding *diverged*; in less than 100 steps, the last tenth above "
        "1.5 times the first loss",
    ),
    ("rolled_back", "it went back to an earlier state at least once"),
    (
        "spiked",
        "a detector has reported a loss above its limit, three outliers of the loss in a row, or the finding *spiky* "
        "or *rises at the start*",
    ),
    ("healthy", "none of these"),
)
"""The words for the outcome of a run, with what they mean; the first one that applies counts."""

_OF_END = {
    "failed": "failed",
    "refused": "failed",
    "stopped": "stopped",
    "interrupted": "killed",
    "terminated": "killed",
    "killed": "killed",
}


def outcome_by_end(end: str) -> str | None:
    """Return the outcome of a run that did not finish; None if what it has recorded decides.

    Args:
        end: as for `outcome`.
    """
    return _OF_END.get(end.lower())


@np.errstate(all="ignore")
def outcome(series: Series, end: str) -> str:
    """Return the outcome of a run as one of the words of `OUTCOMES`.

    Args:
        series: the recorded run.
        end: how it ended, as in result.json, or MLflow's status; any other word is a run that has finished, or that
            still runs.
    """
    by_end = outcome_by_end(end)
    if by_end is not None:
        return by_end
    if rules.diverged(series, series.curve) or rules.ends_above_start(series) or rules.exploded_at_start(series):
        return "diverged"
    if series.rollbacks:
        return "rolled_back"
    steps = rules.spikes(series)[0]
    in_a_row = len(steps) > 2 and bool((steps[2:] - steps[:-2] <= 2 * series.every).any())
    if series.spikes or in_a_row:
        return "spiked"
    rose = (rules.spiky, rules.rises_at_the_start)
    return "spiked" if any(rule(series, series.curve) is not None for rule in rose) else "healthy"
