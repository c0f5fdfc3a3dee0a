"""`Guard`: the options of the guard, given as one more callback."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stabletrain.errors import require
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.support import DecisionMode


class Guard(GuardMember):
    """Options of the guard that all plugins of a Trainer share; needed only to change a default.

    Args:
        mode: where decisions are made. ``"exact"``: the host reads loss and norm before each step. ``"device"``: a
            fused optimizer's kernel clips or skips, and the host never waits for the step in progress. ``"auto"``
            (default): ``"device"`` on CUDA with a fused optimizer, without a loss scaler and without a per-step
            scheduler of the module; else ``"exact"``.
        max_attempts: attempted steps after which the run is stopped, at least 1; None: twice ``max_steps`` if that is
            set. It ends a run in which all steps are skipped.
        events: file for the event log, one JSON object per line; None: ``events.jsonl`` in the logger's folder. After
            64 MiB, of what is found (spikes, skips and the like) only the 1st, 2nd, 4th ... of a kind is written.

    Raises:
        UserError: if an option is out of range; when training starts, if ``mode="device"`` is impossible.

    >>> Guard(mode="exact", max_attempts=1000).max_attempts
    1000
    """

    def __init__(
        self, mode: DecisionMode = "auto", max_attempts: int | None = None, events: str | Path | None = None
    ) -> None:
        known = mode in ("auto", "exact", "device")
        require(known, "Guard", "mode", '"auto", "exact" or "device"', mode, "guard")
        enough = max_attempts is None or max_attempts >= 1
        require(enough, "Guard", "max_attempts", ">= 1, or null", max_attempts, "guard")
        self.mode: DecisionMode = mode
        self.max_attempts = max_attempts
        self.events = events

    def guard_options(self) -> dict[str, Any]:
        """The options as keyword arguments of `StepGuard`."""
        events = None if self.events is None else Path(self.events)
        return {"mode": self.mode, "max_attempts": self.max_attempts, "events": events}


def changed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `Guard` that differ from their defaults.

    >>> changed_options({"mode": "exact", "max_attempts": None})
    {'mode': 'exact'}
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(Guard).parameters.items()}
    return {key: value for key, value in options.items() if value != defaults.get(key)}
