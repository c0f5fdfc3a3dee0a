"""Events as strict JSON."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from stabletrain.core.events import Event


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


numbers = st.one_of(st.floats(), st.integers(-(2**53), 2**53))


@given(st.integers(0), numbers, numbers, st.text())
def test_a_line_is_strict_json_with_every_field(step: int, value: float, limit: float, reason: str) -> None:
    """Bugs: NaN or Infinity in the file, which other parsers refuse; a newline within a record; a count as value."""
    line = Event(step, "clip", "skip", value, limit, reason).to_json()
    assert "\n" not in line
    record = json.loads(line, parse_constant=refuse)
    for key, number in (("value", value), ("limit", limit)):
        read = record.pop(key)
        assert isinstance(read, str) is not math.isfinite(number)
        assert float(read) == number or (math.isnan(float(read)) and math.isnan(number))
    assert record == {"step": step, "plugin": "clip", "kind": "skip", "reason": reason}
