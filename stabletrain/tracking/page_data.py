"""The curves and events of runs as the JSON that a page with charts holds.

Arrays are base64: steps as differences in 16 bits where they fit, values as float32. Events are complete up to
`MAX_EVENTS` a run; of a run with more, the most frequent kinds are counted in pieces of the run.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stabletrain.core.events import Event
from stabletrain.tracking.page_charts import CHARTS, KINDS
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
