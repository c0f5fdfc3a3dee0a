"""The arguments of a rollback, and the rule within it: the detector of spikes and divergences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stabletrain.core.bytes import parse
from stabletrain.core.spikes import SpikeDetection


@dataclass(frozen=True, kw_only=True)
class RollbackRule(SpikeDetection):
    """The detector, with what else `Rollback` is told; see there for the arguments."""

    plugin = "rollback"
    slot = "spike"

    every: int = 50
    keep: int = 3
    trust_after: int = 25
    drop: Literal["offending", "since_snapshot", "none"] = "offending"
    baselines: Literal["restore", "reset"] = "restore"
    rewarm: int | None = 100
    max_rollbacks: int = 10
    cool_down: int = 100
    check_every: int = 10
    max_growth: float = 10.0
    where: Literal["host", "device"] = "host"
    max_memory: str | None = None
    spill: str | None = None
    replay: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.every >= 1, "every", ">= 1")
        self.require(self.keep >= 2, "keep", ">= 2: one snapshot on trial, and one to go back to")
        self.require(1 <= self.trust_after <= self.every, "trust_after", f"from 1 to every={self.every}")
        self.require(
            self.drop in ("offending", "since_snapshot", "none"), "drop", '"offending", "since_snapshot", "none"'
        )
        self.require(self.baselines in ("restore", "reset"), "baselines", '"restore" or "reset"')
        self.require(self.rewarm is None or self.rewarm >= 0, "rewarm", ">= 0, or null for the schedule's own length")
        self.require(
            self.max_rollbacks >= 1, "max_rollbacks", ">= 1; to watch and never go back, use plugins/spike=detect"
        )
        self.require(self.cool_down >= 0, "cool_down", ">= 0")
        self.require(self.check_every >= 1, "check_every", ">= 1")
        self.require(1 < self.max_growth < math.inf, "max_growth", "> 1 and finite")
        self.require(self.where in ("host", "device"), "where", '"host" or "device"')
        if self.max_memory is not None:
            parse(self.max_memory, name=f"plugins.{self.slot}.max_memory")

    def too_rare(self, total: int | None) -> str | None:
        """A warning, if a run of so many applied steps is too short for this interval; None: it is not, or unknown."""
        if total is None or self.every <= total:
            return None
        return (
            f"rollback: every={self.every} is more than the {total} steps of this run: there will be one snapshot, of "
            "the first step. Choose a smaller plugins.spike.every"
        )
