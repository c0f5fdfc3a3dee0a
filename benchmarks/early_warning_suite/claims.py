"""What the results allow to say, in sentences with their numbers, and beside those of the first measurement."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from early_warning_suite import judge, unions
from early_warning_suite.readings import READINGS
from early_warning_suite.results import Results
from early_warning_suite.settings import TROUBLED
from early_warning_suite.unions import FIXED, OWN, PUBLISHED, Union

_DATA = tuple(each.name for each in TROUBLED if each.data is not None)
_INJECTED = tuple(each.name for each in TROUBLED if each.grow is not None)
_SOON = 8
"""Steps after the rise within which the first measurement of the slow-rise rule found it."""
_RISES = ("slow rise", "divergence")
_HEALTHY = ("calibration", "seen", "unseen")


def sentences(results: Results) -> str:
    """The sentences, as a list; what no run has shown yet is left out."""
    if not results.risen or not results.part("calibration"):
        return "Nothing yet: there are no runs of the calibration, or none whose loss rose."
    said = [
        f"**With limits from healthy runs**, {unions.FIVE.name} lead the loss by {judge.LEAD} steps or more in "
        f"{_led(results, unions.FIVE)} runs ({_led(results, unions.FOUR)} without the update), the gradient norm in "
        f"{_led(results, unions.GRAD_NORM)}.",
        f"**The limits do not carry over**: the five fire in {_false(results, 'seen', unions.FIVE)} healthy runs of "
        f"the settings that the limits come from, and in {_false(results, 'unseen', unions.FIVE)} of others. So no "
        "warning is on by default, and a limit for `warn_above` should come from healthy runs of the same setting.",
        f"**Looks now and then see less**: every 10 steps the five lead in {_led(results, unions.EVERY_10)} runs, "
        f"every 50 in {_led(results, unions.EVERY_50)}.",
        _per_reading(results, FIXED),
        f"{_per_reading(results, OWN)} The update follows the learning rate: its own history says that the rate moved.",
        f"**The loss itself, judged like a reading** ({unions.LOSS_RISE.name}, limit from healthy runs), leads in "
        f"{_led(results, unions.LOSS_RISE)} runs; false alarms in {_false(results, 'seen', unions.LOSS_RISE)} seen and "
        f"{_false(results, 'unseen', unions.LOSS_RISE)} unseen healthy ones. Every run has this number.",
        _published(results),
        _of_data(results),
        _slow_rise(results),
    ]
    return "\n".join(f"- {each}" for each in said if each)


def compared(results: Results) -> str:
    """A table of the claims of the first measurement and of the numbers here."""
    risen, healthy = results.risen, results.healthy(*_HEALTHY)
    silent = sum(results.after(run, "detect_spikes") is None for run in risen)
    sharp = Union("", ["sharpness"])
    rows = (
        ("runs whose loss rose", "39 of 42", f"{len(risen)} of {len(results.part('troubled'))}"),
        ("led by five readings", "21 of 39", _led(results, unions.FIVE)),
        ("without the update", "15 of 39", _led(results, unions.FOUR)),
        ("by the gradient norm", "3 of 39", _led(results, unions.GRAD_NORM)),
        ("by the attention bound above 100", "5 of 39", _led(results, unions.BOUND_100)),
        ("by sharpness, limit of the calibration", "0 of 39", _led(results, sharp)),
        ("false alarms of the five, seen settings", "0 of 24", _false(results, "seen", unions.FIVE)),
        ("false alarms of the five, unseen settings", "7 of 16", _false(results, "unseen", unions.FIVE)),
        ("RMS_t above 2.3 in healthy runs", "21 of 21", _false(results, "seen", unions.RMS_T)),
        (f"slow-rise rule, reported within {_SOON} steps", "36 of 39", _within(results, "slow_rise")),
        ("slow-rise rule, steps after the rise", "median 3.5, worst 8", _found(results, "slow_rise")),
        ("slow-rise rule in healthy runs", "0 of 56", _reported(results, "slow_rise")),
        (
            "`detect_spikes` says nothing (at that time without the slow-rise rule)",
            "11 of 39",
            f"{silent} of {len(risen)}",
        ),
        ("`detect_spikes` reports something in healthy runs", "5 of 24 seen", _reported(results, "detect_spikes")),
    )
    lines = ["| claim | first measurement | here |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    note = (
        "The first measurement computed the readings in its script: it saw no attention of `nn.MultiheadAttention`, "
        "read the RMS of the last hidden state only, took the attention's entropy from the ninth query on, "
        "counted rows of an embedding that were never used in RMS_t and sharpness, took the missing RMS_t of SGD for "
        f"an infinite one, and found the sharpness by power iteration. Healthy runs here: {len(healthy)}."
    )
    return "\n".join(lines) + "\n\n" + note


def _per_reading(results: Results, by: str) -> str:
    found = {each: results.whole_kinds(each.key, by) for each in READINGS if each.key != "loss_rise"}
    several = [(each.name, kinds) for each, kinds in found.items() if len(kinds) > 1]
    listed = ", ".join(f"{name} ({_number(kinds)})" for name, kinds in several)
    count = sum(bool(results.kind(each.name)) for each in TROUBLED)
    which = "a fixed limit" if by == FIXED else "its own history"
    return (
        f"**Judged by {which}**, readings that lead in all runs of more than one kind of trouble: {listed or 'none'}, "
        f"of {count} kinds."
    )


def _number(kinds: Collection[str]) -> str:
    injected = sum(kind in _INJECTED for kind in kinds)
    return f"{len(kinds)}, {injected} of them injected" if injected else str(len(kinds))


def _published(results: Results) -> str:
    texts = []
    for each in READINGS:
        if each.published is not None and each.key != "logit":
            union = Union(each.name, [each.key], PUBLISHED)
            texts.append(
                f"{each.name} above {each.published:g} leads in {_led(results, union)} runs and fires in "
                f"{_false(results, 'seen', union)} seen and {_false(results, 'unseen', union)} unseen healthy ones"
            )
    return f"**Published limits**: {'; '.join(texts)}."


def _of_data(results: Results) -> str:
    runs = [run for kind in _DATA for run in results.kind(kind) if run["risen"] is not None]
    leading = [
        f"{each.name} ({led})"
        for each in READINGS
        if each.key != "loss_rise" and (led := sum(results.leads(run, [each.key], FIXED) for run in runs))
    ]
    if not runs:
        return ""
    return (
        f"**Faults of the data** ({len(runs)} runs) are seen first in the loss: with a fixed limit, "
        f"{'no reading leads' if not leading else 'only ' + ', '.join(leading) + ' lead'}."
    )


def _slow_rise(results: Results) -> str:
    return (
        f"**The slow-rise rule on the loss alone** reports {_within(results, 'slow_rise')} runs within {_SOON} steps "
        f"({_found(results, 'slow_rise')} steps after the rise) and {_reported(results, 'slow_rise')} healthy ones; "
        f"within `detect_spikes`, whose divergences count too, {_within(results, 'detect_spikes', _RISES)} and "
        f"{_reported(results, 'detect_spikes', _RISES)}. It is later than a reading that leads, but needs no limit."
    )


def _led(results: Results, union: Union) -> str:
    return "{} of {}".format(*results.led(union))


def _false(results: Results, part: str, union: Union) -> str:
    return "{} of {}".format(*results.false(part, union))


def _after(results: Results, detector: str, kinds: Sequence[str] = ()) -> list[int]:
    found = (results.after(run, detector, kinds) for run in results.risen)
    return [step for step in found if step is not None]


def _within(results: Results, detector: str, kinds: Sequence[str] = ()) -> str:
    return f"{sum(step <= _SOON for step in _after(results, detector, kinds))} of {len(results.risen)}"


def _found(results: Results, detector: str) -> str:
    steps = _after(results, detector)
    return f"median {statistics.median(steps):g}, worst {max(steps)}" if steps else "none"


def _reported(results: Results, detector: str, kinds: Sequence[str] = ()) -> str:
    healthy = results.healthy(*_HEALTHY)
    return f"{sum(any(not kinds or kind in kinds for _, kind in run[detector]) for run in healthy)} of {len(healthy)}"
