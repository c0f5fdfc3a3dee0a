import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletrain.tracking.naming import MAX_KEY, flatten, safe_key, shorten

NASTY = [
    "",
    ".",
    "..",
    "/",
    "a//b",
    "a/../b",
    "/a",
    "a/",
    "./a",
    "x@y",
    "x#y",
    "xy",
    "é",
    "x" * 251,
    "x" * 252,
    "\ud800",
    "a:b",
]


@pytest.mark.parametrize("name", NASTY)
def test_mlflow_accepts_every_key(name):
    """Bug: one strange metric name makes MLflow refuse the whole batch of 1000."""
    from mlflow.utils.validation import _validate_metric, _validate_param, _validate_tag

    key = safe_key(name)
    _validate_metric(key, 1.0, 0, 0)
    _validate_param(key, "x")
    _validate_tag(key, "x")


def test_no_two_names_become_one():
    """Bug: 'x@y' and 'xy' are drawn as one curve (Lightning's logger strips what MLflow refuses)."""
    assert len({safe_key(name) for name in NASTY}) == len(NASTY)


@given(st.text(max_size=300))
def test_any_text(name):
    """Bug: a name outside the table above is refused, or a valid one is changed."""
    from mlflow.utils.validation import _validate_metric_name

    key = safe_key(name)
    _validate_metric_name(key)
    assert len(key) <= MAX_KEY
    assert safe_key(key) == key


def test_shorten_keeps_the_difference():
    """Bug: two long values with the same start compare as equal."""
    one, two = shorten("a" * 9000, 6000), shorten("a" * 8999 + "b", 6000)
    assert one != two
    assert len(one) == len(two) == 6000


def test_flatten_keeps_every_leaf():
    """Bug: empty mappings, None and lists of mappings disappear from the record."""
    nested = {"a": {"b": None, "c": {}}, "d": [1, 2], "e": [{"f": 1}, 2], "g": []}
    assert dict(flatten(nested)) == {"a.b": None, "a.c": "{}", "d": [1, 2], "e.0.f": 1, "e.1": 2, "g": []}
