"""Whether a protection harms a case: the rule, and the figures that it is applied to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from json_lines import Record

from harm_suite.stacks import NOTHING

HARMED, UNCLEAR, UNHARMED = "harmed", "unclear", "no harm"


class Verdict(NamedTuple):
    """The figures of one case with one protection, over the seeds that both the bare and the protected runs have.

    Args:
        answer: HARMED, UNCLEAR or UNHARMED.
        bare: mean metric without protection; NaN if one of the bare runs has none.
        metric: mean metric with protection; NaN if one of the runs has none.
        difference: ``metric - bare``, which is the mean of the paired differences.
        limit: the difference above which it is harm.
        worst: the metric without and with protection of the seed with the largest difference.
        seeds: number of seeds.
        skipped: steps that were dropped, sum of the seeds.
        clipped: share of the attempted steps with a clipped gradient, 0 to 1.
        rollbacks: sum of the seeds.
        accepted: events of the kind ``accept``, sum of the seeds.
        stops: number of runs that ended too early.
    """

    answer: str
    bare: float
    metric: float
    difference: float
    limit: float
    worst: tuple[float, float]
    seeds: int
    skipped: int
    clipped: float
    rollbacks: int
    accepted: int
    stops: int


def judge(bare: Sequence[Record], made: Sequence[Record]) -> Verdict:
    """Judge runs with a protection by the bare runs of the same case and seeds, in the same order.

    HARMED: a run ended too early or has no finite metric, or the mean of the paired differences is above the largest of

    - ``least`` of the case,
    - two standard errors of the paired differences,
    - two standard errors of the bare metric over the seeds.

    UNCLEAR: it is above the first and the third, but not above the second: some seeds are harmed and others are not,
    so that more seeds are needed. Also UNCLEAR: a bare run has no finite metric. With a single seed the standard
    errors are 0.

    Raises:
        ValueError: if the seeds differ or there are none.
    """
    if not bare or [each["seed"] for each in bare] != [each["seed"] for each in made]:
        raise ValueError("judge: expected runs of the same seeds, without protection and with it, and at least one")
    before, after = [_metric(each) for each in bare], [_metric(each) for each in made]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = statistics.fmean(differences)
    floor = max(bare[0]["least"], 2 * standard_error(before))
    limit = max(floor, 2 * standard_error(differences))
    stops = sum(bool(each["ended"]) for each in made)
    is_finite = all(each["metric"] is not None for each in made)
    if stops or not is_finite or mean > limit:
        answer = HARMED
    else:
        answer = UNCLEAR if mean > floor or math.isnan(mean) else UNHARMED
    index = max(range(len(differences)), key=lambda i: (math.isnan(after[i]), differences[i]))
    attempts = sum(each["attempts"] for each in made)
    return Verdict(
        answer,
        statistics.fmean(before),
        statistics.fmean(after),
        mean,
        limit,
        (before[index], after[index]),
        len(made),
        sum(each["skipped"] for each in made),
        sum(each["clipped"] for each in made) / max(1, attempts),
        sum(each["rollbacks"] for each in made),
        sum(each["accepted"] for each in made),
        stops,
    )


def learns(bare: Sequence[Record]) -> bool:
    """Whether the bare runs are trainings at all: each completes, and ends better than it began by twice ``least``."""
    return bool(bare) and all(
        not each["ended"]
        and each["metric"] is not None
        and (each["before"] is None or each["before"] - each["metric"] > 2 * each["least"])
        for each in bare
    )


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single value, NaN if one is NaN."""
    n, mean = len(values), statistics.fmean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else 0.0


class Results:
    """Records by case, protection and seed.

    Args:
        records: with their present ``setup`` only.
        seeds: those to be judged.
    """

    def __init__(self, records: Iterable[Record], seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self._records = {(each["case"], each["stack"], each["seed"]): each for each in records}

    def runs(self, case: str, stack: str) -> list[Record]:
        """Return the runs of a case with a protection, by seed."""
        found = (self._records.get((case, stack, seed)) for seed in self.seeds)
        return [each for each in found if each is not None]

    def verdict(self, case: str, stack: str) -> Verdict | None:
        """Judge by the seeds that both have; None if there is none."""
        bare, made = self.runs(case, NOTHING), self.runs(case, stack)
        both = {each["seed"] for each in bare} & {each["seed"] for each in made}
        if not both:
            return None
        return judge(*([each for each in runs if each["seed"] in both] for runs in (bare, made)))


def _metric(record: Record) -> float:
    return float("nan") if record["metric"] is None else float(record["metric"])
