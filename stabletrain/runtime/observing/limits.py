"""Limits of readings that the user has chosen: above one, there is an event of kind ``warning``, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from stabletrain.core.events import Event
from stabletrain.errors import did_you_mean, is_number


def check_limits(
    limits: object, readings: Collection[str], require: Callable[[bool, str, str, object], None]
) -> dict[str, float]:
    """The limits as numbers; raises an error of the argument ``warn_above`` if they are none.

    Args:
        limits: by the name of a reading; None: there are none.
        readings: the names that are known.
        require: called with whether it is right, the argument, what is expected, and what was given.
    """
    argument = "warn_above"
    if limits is None:
        return {}
    require(isinstance(limits, Mapping), argument, "limits by the name of a reading", limits)
    assert isinstance(limits, Mapping), "checked above"
    for name, limit in limits.items():
        known = f"a reading of {', '.join(sorted(readings))}{did_you_mean(str(name), readings)}"
        require(name in readings, argument, f"by {known}", str(name))
        require(is_number(limit) and math.isfinite(limit) and limit >= 0, f"{argument}.{name}", "a number >= 0", limit)
    return {str(name): float(limit) for name, limit in limits.items()}


def warnings_of(
    values: Mapping[str, Mapping[str, float]], limits: Mapping[str, float], step: int, plugin: str, key: str
) -> list[Event]:
    """An event for each reading that is above its limit somewhere; it names the largest one.

    Args:
        values: by the name of the reading, then by layer; the layer is empty for what is read once.
        limits: by the name of the reading.
        step: attempted step in which it was read.
        plugin: that has read it.
        key: its config node, such as ``plugins.outputs``.
    """
    events = []
    for name, limit in limits.items():
        above = {layer: value for layer, value in values.get(name, {}).items() if not value <= limit}
        if above:
            layer = max(above, key=lambda each: math.inf if math.isnan(above[each]) else above[each])
            value = above[layer]
            where = f" of {layer}" if layer else ""
            more = f", and above it in {len(above) - 1} more" if len(above) > 1 else ""
            reason = (
                f"{name}{where} is {value:.4g}, above its limit {limit:g}{more} ({key}.warn_above.{name}={limit:g})"
            )
            events.append(Event(step, plugin, "warning", value, limit, reason))
    return events
