"""What `Rollback` stores in a checkpoint besides the detector's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_warn

from stabletrain.core.state import from_plain, to_plain
from stabletrain_plugins.rollback.acceptance import Accepting
from stabletrain_plugins.rollback.incidents import IncidentState
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Intervention
from stabletrain_plugins.rollback.weight_monitor import WeightHistory


class RollbackState(NamedTuple):
    """The fields are the keys in the checkpoint.

    Args:
        made: the rollbacks of the run, oldest first.
        levels: the accepted levels of the run, oldest first.
        accepting: what later decisions about levels depend on.
        incident: the open incident.
        weights: earlier samples of the weights.
    """

    made: tuple[Intervention, ...] = ()
    levels: tuple[AcceptedLevel, ...] = ()
    accepting: Accepting = Accepting()
    incident: IncidentState = IncidentState()
    weights: WeightHistory = WeightHistory()

    def to_dict(self) -> dict[str, Any]:
        """As plain Python types, by field."""
        return {field: to_plain(value) for field, value in self._asdict().items()}

    @classmethod
    def of(cls, saved: Mapping[str, Any], plugin: str) -> RollbackState:
        """The inverse of `to_dict`.

        What a checkpoint of another version lacks has its default; a part that cannot be read is left out, with a
        warning.

        Args:
            saved: part of a checkpoint; other keys are ignored.
            plugin: its name, for the warning.
        """
        kinds: dict[str, Any] = {
            "made": tuple[Intervention, ...],
            "levels": tuple[AcceptedLevel, ...],
            "accepting": Accepting,
            "incident": IncidentState,
            "weights": WeightHistory,
        }
        found: dict[str, Any] = {}
        for field, kind in kinds.items():
            if field not in saved:
                continue
            try:
                found[field] = from_plain(kind, _completed(field, saved[field]))
            except (ValueError, TypeError):
                rank_zero_warn(f"{plugin}: the checkpoint was written by another version: its {field!r} is not read")
        return cls(**found)


def _completed(field: str, plain: Any) -> Any:
    """A list of interventions, with the defaults of those fields that were added after it was written."""
    kind: Any = {"made": Intervention, "levels": AcceptedLevel}.get(field)
    return plain if kind is None else [{**kind._field_defaults, **each} for each in plain]
