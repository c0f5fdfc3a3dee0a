"""What a checkpoint says of rollbacks and levels, also one of another version."""

from __future__ import annotations

from typing import Any

import pytest

from stabletrain.core.state import to_plain
from stabletrain_plugins.rollback.acceptance import Accepting, Place
from stabletrain_plugins.rollback.checkpoint_state import RollbackState
from stabletrain_plugins.rollback.incidents import IncidentState
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Intervention, excluded_batches
from stabletrain_plugins.rollback.weight_monitor import WeightHistory, WeightSample

BATCH, OTHER = ("samples", 1, "b"), ("batch", 0, 7)
MADE = Intervention(100, 80, None, (95, 75), (BATCH, OTHER), (), 3, "restore", "p", "c", rewound=False)
LEVEL = AcceptedLevel(160, 97, (OTHER,), (3.0, 3.5), (1.0, 2.0), 3, 3.25, 1.0, "p: c")
STATE = RollbackState(
    (MADE,),
    (LEVEL,),
    Accepting((Place(95, None, 0), Place(96, 2.5, 1)), 97),
    IncidentState((170, 99), 2, 0, (3.0,), (1.0,)),
    WeightHistory(WeightSample(170, (1.0, 2.0), 0.1), None, (0.5,)),
)


def test_all_of_it_comes_back() -> None:
    """Bug: a resumed run decides otherwise, because a part was not saved."""
    saved: dict[str, Any] = {**STATE.to_dict(), "counters": {}, "state": {}}
    assert RollbackState.of(saved, "rollback") == STATE
    assert excluded_batches((*STATE.made, *STATE.levels)) == {BATCH}


def test_a_checkpoint_from_before_levels_were_accepted() -> None:
    """Bug: a run cannot be resumed after an update."""
    assert RollbackState.of({}, "rollback") == RollbackState()
    old = to_plain(MADE)
    del old["rewound"]
    found = RollbackState.of({"made": [old], "weights": to_plain(STATE.weights)}, "rollback")
    assert found == RollbackState(made=(MADE._replace(rewound=True),), weights=STATE.weights)


@pytest.mark.parametrize("field", RollbackState._fields)
@pytest.mark.parametrize("broken", [{"unknown": 1}, [{"unknown": 1}], 3])
def test_a_part_of_a_later_version_is_left_out(field: str, broken: Any) -> None:
    """Bug: a traceback instead of a warning, or the other parts are lost with it."""
    with pytest.warns(UserWarning, match=f"rollback: the checkpoint was written by another version: its '{field}'"):
        found = RollbackState.of({**STATE.to_dict(), field: broken}, "rollback")
    assert found == STATE._replace(**{field: getattr(RollbackState(), field)})
