"""The curves and events of runs as the JSON that a page with charts holds.

Arrays are base64: steps as differences in 16 bits where they fit, values as float32. Events are complete up to
`MAX_EVENTS` a run; of a run with more, the most frequent kinds are counted in pieces of the run.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from stabletrain.core.events import Event
from stabletrain.tracking.thinning import BUCKETS, Curve, smooth, thin

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_EVENTS = 2000
"""Events of one run that are all shown, each at its step."""
_MAX_REASONS = 200_000
"""Characters of reasons in one page; the events that changed a run most have theirs first."""
_MAX_REASON = 300
_MANY_RUNS = 5
"""Above this number of runs a curve is a smoothed line over a faint raw one."""
_COLOURS = 8
_GREATEST = 3.4e38
"""About the largest float32."""
_TOO_LATE = 2**53
"""A step that no run reaches: JavaScript has no larger whole numbers."""


class Chart(NamedTuple):
    """A chart of a page.

    Args:
        key: of the curves in it.
        title: above it.
        unit: of its values.
        log: whether its axis is logarithmic at first.
        noisy: whether many runs have a smoothed line over a faint one.
    """

    key: str
    title: str
    unit: str
    log: bool = False
    noisy: bool = False


CHARTS = (
    Chart("loss", "Loss", "the module's unit, often nats", noisy=True),
    Chart("val_loss", "Validation loss", "the module's unit, often nats"),
    Chart("grad_norm", "Gradient norm", "global L2, before clipping", log=True, noisy=True),
    Chart("lr", "Learning rate", "of the first parameter group"),
    Chart("loss_scale", "Loss scale", "of the fp16 loss scaler", log=True),
)
"""All charts, in the order of the page; one without curves is left out."""


class Kind(NamedTuple):
    """How a kind of event looks.

    Args:
        key: an event's kind, or ``clip``.
        label: the word for one.
        meaning: what happened.
        shape: ``back``, ``circle``, ``cross``, ``diamond``, ``square``, ``tick`` or ``triangle``.
        colour: variable of the stylesheet.
        line: whether all charts show a line where it happened, since the run was another one from there on.
    """

    key: str
    label: str
    meaning: str
    shape: str
    colour: str
    line: bool = False


KINDS = (
    Kind("stop", "stop", "a plugin ended the run", "square", "--bad", line=True),
    Kind("rollback", "rollback", "training went back to an earlier state", "back", "--note", line=True),
    Kind("divergence", "divergence", "the loss or the norm did not come back", "diamond", "--bad"),
    Kind("accept", "accepted", "a new level that going back did not change was accepted", "diamond", "--note"),
    Kind("rewarm", "re-warm-up", "the learning rate warmed up again", "triangle", "--note"),
    Kind("not_learning", "not learning", "the loss had not fallen", "diamond", "--warn"),
    Kind("overfitting", "overfitting", "the validation loss rose", "diamond", "--warn"),
    Kind("regime", "new level", "the baselines were learned again", "circle", "--quiet"),
    Kind("announced", "announced", "a change by design", "circle", "--quiet"),
    Kind("nonfinite", "non-finite", "a NaN or an infinity", "cross", "--bad"),
    Kind("spike", "spike", "above the limit, and back", "triangle", "--warn"),
    Kind("skip", "skip", "the step was dropped: nothing was learned from it", "cross", "--c0"),
    Kind("overflow", "overflow", "dropped by the fp16 loss scaler", "circle", "--c6"),
    Kind("clip", "clip", "applied with a smaller gradient", "tick", "--c2"),
)
"""Kinds of events, those that change a run most first."""
_RANK = {kind.key: rank for rank, kind in enumerate(KINDS)}


@dataclass(frozen=True, kw_only=True)
class PageRun:
    """What a page shows of one run.

    Args:
        name: of the run.
        group: what the runs that share its colour have in common, such as ``clip=zscore``; empty: its name.
        curves: key of a chart in `CHARTS` -> curve.
        events: of the plugins.
        marks: kind of event -> steps at which it happened, also of those that ``events`` lacks.
    """

    name: str
    group: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    events: Sequence[Event] = ()
    marks: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)


def page_data(runs: Sequence[PageRun]) -> dict[str, Any]:
    """Return the content of a page's data block, for JSON.

    Args:
        runs: in the order of their rows.
    """
    groups = [run.group or run.name for run in runs]
    colours = _colours(groups)
    left = _MAX_REASONS // max(1, len(runs))
    return {
        "charts": [chart._asdict() for chart in CHARTS],
        "kinds": [kind._asdict() for kind in KINDS],
        "runs": [
            {
                "name": run.name,
                "group": group,
                "colour": colours[group],
                "curves": {
                    chart.key: _curve(run.curves[chart.key], chart.noisy and len(runs) > _MANY_RUNS)
                    for chart in CHARTS
                    if chart.key in run.curves and len(run.curves[chart.key].step)
                },
                "marks": _marks(run, left),
            }
            for run, group in zip(runs, groups, strict=True)
        ],
    }


def _curve(curve: Curve, smoothed: bool) -> list[Any]:
    return [_packed(thin(curve)), _packed(smooth(curve)) if smoothed else None]


def _packed(curve: Curve) -> list[Any]:
    import numpy as np

    finite = np.isfinite(curve.value)
    value = np.where(finite, np.clip(curve.value, -_GREATEST, _GREATEST), curve.value)
    return [_steps(curve.step), _base64(value.astype("<f4"))]


def _steps(step: NDArray[np.int64]) -> list[str]:
    import numpy as np

    apart = np.diff(step, prepend=0)
    if len(step) and (step.max() > 0xFFFFFFFF or apart.min() < 0):  # another tool's, such as tokens
        return ["f", _base64(step.astype("<f8"))]
    if len(step) and apart.max() > 0xFFFF:
        return ["u", _base64(step.astype("<u4"))]
    return ["d", _base64(apart.astype("<u2"))]


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _marks(run: PageRun, characters: int) -> list[dict[str, Any]]:
    """The events by kind: the steps, and reasons as far as there is room."""
    import numpy as np

    reasons: dict[str, dict[int, str]] = defaultdict(dict)
    for event in run.events:  # from a file that anybody may have written
        if str(event.kind) in _RANK and 0 <= event.step < _TOO_LATE:
            reasons[event.kind].setdefault(event.step, str(event.reason))
    steps = {kind: np.array(sorted(found), dtype=np.int64) for kind, found in reasons.items()}
    for kind, found in run.marks.items():
        steps[kind] = np.union1d(steps.get(kind, found), found)
    steps = {kind: found for kind, found in steps.items() if len(found)}
    counted = _too_many({kind: len(found) for kind, found in steps.items()})
    every = max(1, -(-(max((int(found[-1]) for found in steps.values()), default=0) + 1) // BUCKETS))
    marks: list[dict[str, Any]] = []
    for kind in sorted(steps, key=_RANK.__getitem__):
        if kind in counted:
            pieces, counts = np.unique(steps[kind] // every, return_counts=True)
            marks.append({"kind": kind, "x": _steps(pieces * every), "count": counts.tolist(), "every": every})
            continue
        texts: list[str | None] = []
        for step in steps[kind].tolist():
            text = reasons[kind].get(step, "")[:_MAX_REASON]
            characters -= len(text)
            texts.append(text if characters >= 0 and text else None)
        marks.append({"kind": kind, "x": _steps(steps[kind]), "reasons": texts if any(texts) else None})
    return marks


def _too_many(counts: Mapping[str, int]) -> set[str]:
    """The most frequent kinds, without which at most `MAX_EVENTS` events are left."""
    total, found = sum(counts.values()), set()
    for kind in sorted(counts, key=counts.__getitem__, reverse=True):
        if total <= MAX_EVENTS:
            break
        total -= counts[kind]
        found.add(kind)
    return found


def _colours(groups: Iterable[str]) -> dict[str, tuple[str, float]]:
    """One colour for each group: by its place on a scale if groups are values of one number, else one of a palette."""
    distinct = list(dict.fromkeys(groups))
    numbers = [_number(group) for group in distinct]
    names = {name for name, _ in numbers}
    values = sorted(value for _, value in numbers if value is not None)
    if len(distinct) > _COLOURS // 2 and len(names) == 1 and len(values) == len(distinct):
        return {
            group: ("scale", values.index(value) / (len(values) - 1))
            for group, (_, value) in zip(distinct, numbers, strict=True)
            if value is not None
        }
    return {group: ("c", place) for place, group in enumerate(distinct)}


def _number(group: str) -> tuple[str, float | None]:
    name, _, text = group.rpartition("=")
    try:
        return name, float(text)
    except ValueError:
        return name, None
