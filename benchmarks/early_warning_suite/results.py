"""The records of all runs, and the questions that the page asks about them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from json_lines import Record

from early_warning_suite import judge
from early_warning_suite.judge import Summary
from early_warning_suite.readings import READINGS
from early_warning_suite.settings import TROUBLED
from early_warning_suite.unions import FIXED, OWN, Union


class Results:
    """The records of the settings as they are now.

    Args:
        records: of all parts.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.limits = {each.key: self._limit(each.key) for each in READINGS}
        self.published = {each.key: each.published for each in READINGS}

    def part(self, name: str) -> list[Record]:
        """The runs of a part."""
        return [each for each in self.records if each["part"] == name]

    def healthy(self, *parts: str) -> list[Record]:
        """The runs of these parts whose loss did not rise, as it should not."""
        return [each for part in parts for each in self.part(part) if each["risen"] is None]

    def kind(self, setting: str) -> list[Record]:
        """The runs of a kind of trouble, by seed."""
        return sorted((r for r in self.part("troubled") if r["setting"] == setting), key=lambda record: record["seed"])

    @property
    def risen(self) -> list[Record]:
        """The runs of all kinds of trouble whose loss rose."""
        return [each for each in self.part("troubled") if each["risen"] is not None]

    def has(self, record: Record, reading: str) -> bool:
        """Whether a run has a reading."""
        return reading in record["readings"]

    def alarm(self, record: Record, reading: str, by: str, every: int = 1) -> int | None:
        """The step of the first alarm since the cause of the trouble began; None: none, or no such reading."""
        if not self.has(record, reading):
            return None
        kept = _summary(record, reading)
        if by == OWN:
            return kept.own
        limit = self.limits[reading] if by == FIXED else self.published[reading]
        if limit is None:
            return None
        if every > 1:
            return judge.fixed_at_looks(kept, limit, every, _start(record))
        return judge.fixed(kept, limit)

    def lead(self, record: Record, readings: Iterable[str], by: str, every: int = 1) -> int | None:
        """Steps from the first alarm of any of the readings until the loss has risen; negative: after it."""
        steps = [step for each in readings if (step := self.alarm(record, each, by, every)) is not None]
        return record["risen"] - min(steps) if steps and record["risen"] is not None else None

    def leads(self, record: Record, readings: Iterable[str], by: str, every: int = 1) -> bool:
        """Whether an alarm comes at least 5 steps before the loss has risen."""
        lead = self.lead(record, readings, by, every)
        return lead is not None and lead >= judge.LEAD

    def is_false(self, record: Record, readings: Iterable[str], by: str, every: int = 1) -> bool:
        """Whether one of the readings gives an alarm in a healthy run."""
        return any(self._is_false(record, each, by, every) for each in readings if self.has(record, each))

    def false(self, part: str, union: Union) -> tuple[int, int]:
        """Healthy runs of a part with an alarm, and those that have one of the readings."""
        _, readings, by, every = union
        runs = [each for each in self.healthy(part) if any(self.has(each, reading) for reading in readings)]
        return sum(self.is_false(each, readings, by, every) for each in runs), len(runs)

    def led(self, union: Union) -> tuple[int, int]:
        """Runs in which an alarm leads, and those whose loss rose."""
        return sum(self.leads(each, *union[1:]) for each in self.risen), len(self.risen)

    def whole_kinds(self, reading: str, by: str) -> dict[str, float]:
        """The kinds of trouble in which every run's alarm leads, with the median lead in steps."""
        found = {}
        for setting in TROUBLED:
            runs = [each for each in self.kind(setting.name) if each["risen"] is not None]
            if runs and all(self.leads(each, [reading], by) for each in runs):
                found[setting.name] = statistics.median(self.lead(each, [reading], by) or 0 for each in runs)
        return found

    def after(self, record: Record, detector: str, kinds: Sequence[str] = ()) -> int | None:
        """Steps from the rise of the loss to the first event since the cause began; None: none.

        Args:
            record: of a run whose loss rose.
            detector: ``detect_spikes``, ``skip_outliers`` or ``slow_rise``.
            kinds: of the events; empty: all.
        """
        steps = [step for step, kind in record[detector] if step >= _start(record) and (not kinds or kind in kinds)]
        return steps[0] - record["risen"] if steps else None

    def _is_false(self, record: Record, reading: str, by: str, every: int) -> bool:
        kept = _summary(record, reading)
        if by == OWN:
            return kept.own_before > 0
        limit = self.limits[reading] if by == FIXED else self.published[reading]
        if limit is None:
            return False
        if every > 1:
            return judge.fixed_at_looks(kept, limit, every, 0) is not None
        return judge.fixed_before(kept, limit)

    def _limit(self, reading: str) -> float | None:
        """1.5 times the largest value of the calibration runs; None: none of them has the reading."""
        runs = [each for each in self.part("calibration") if self.has(each, reading)]
        found = [largest for each in runs if (largest := _summary(each, reading).largest) is not None]
        return judge.FACTOR * max(found) if found else None


def _summary(record: Record, reading: str) -> Summary:
    return Summary(**record["readings"][reading])


def _start(record: Record) -> int:
    return next((each.start or 0 for each in TROUBLED if each.name == record["setting"]), 0)
