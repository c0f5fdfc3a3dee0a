"""Events as strict JSON, requests by severity."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletrain.core.events import Event, RequestKind


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@given(st.floats(), st.floats(), st.text())
def test_lines_are_strict_json(value: float, limit: float, reason: str) -> None:
    """Bug: NaN or Infinity in the file, which no other language's parser reads; a newline that splits a record."""
    line = Event(1, "clip", "skip", value, limit, reason).to_json()
    assert "\n" not in line
    record = json.loads(line, parse_constant=refuse)
    assert record["reason"] == reason
    assert repr(float(record["value"])) == repr(value if not math.isnan(value) else math.nan)


def test_integers_and_none_of_the_fields_missing() -> None:
    """Bug: a count as value, that isfinite or JSON refuses."""
    record = json.loads(Event(7, "guard", "stop", 3, math.nan, "three").to_json(), parse_constant=refuse)
    assert record == {"step": 7, "plugin": "guard", "kind": "stop", "value": 3, "limit": "nan", "reason": "three"}


def test_a_stop_outranks_a_rollback_outranks_a_rewarm() -> None:
    """Bug: the mildest of several requests executed."""
    assert RequestKind.REWARM < RequestKind.ROLLBACK < RequestKind.STOP
    with pytest.raises(ValueError, match="0"):
        RequestKind(0)
