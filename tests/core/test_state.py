"""States survive the way into a checkpoint and back."""

import io
from enum import IntEnum
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabletrain.core.state import from_plain, to_plain
from stabletrain.core.statistics import DelayedWindow, Ema, Window


class State(NamedTuple):
    count: int
    flag: bool
    label: str
    ema: Ema | None
    window: Window
    history: tuple[Ema, ...]
    pair: tuple[int, Ema]
    delayed: DelayedWindow = DelayedWindow()


finite = st.floats(allow_nan=False)
emas = st.builds(Ema, finite, finite)
windows = st.lists(st.floats(-1e9, 1e9), max_size=5).map(lambda xs: Window().extend(xs))
states = st.builds(
    State,
    st.integers(),
    st.booleans(),
    st.text(),
    st.none() | emas,
    windows,
    st.lists(emas, max_size=3).map(tuple),
    st.tuples(st.integers(), emas),
    st.builds(DelayedWindow, st.lists(finite, max_size=3).map(tuple), windows),
)


def types_of(value: Any) -> Any:
    return (type(value), [types_of(each) for each in value]) if isinstance(value, tuple) else type(value)


@given(states)
def test_there_and_back(state: State) -> None:
    """Bug: a nested tuple that comes back as a list or without its type, so that the resumed run breaks later."""
    restored = from_plain(State, to_plain(state))
    assert restored == state
    assert types_of(restored) == types_of(state)


def test_plain_states_load_with_weights_only() -> None:
    """Bug: a class in the checkpoint that torch.load(weights_only=True) refuses."""
    state = State(1, True, "x", None, Window().extend([1.0]), (Ema(1.0, 2.0),), (3, Ema(0.0, 1.0)))
    file = io.BytesIO()
    torch.save(to_plain(state), file)
    file.seek(0)
    assert from_plain(State, torch.load(file, weights_only=True)) == state


class Colour(IntEnum):
    RED = 1


class NumberOfMine(float):
    """As numpy's float64: a float by inheritance, and yet refused by ``weights_only``."""


@pytest.mark.parametrize("bad", [[1.0], {"a": 1}, torch.zeros(1), Colour.RED, NumberOfMine(1.0)])
def test_what_no_checkpoint_could_load_is_refused_when_saving(bad: Any) -> None:
    """Bug: a state that can be saved and not loaded: found out only when the run must be resumed."""
    with pytest.raises(TypeError, match=type(bad).__name__):
        to_plain(bad)


@pytest.mark.parametrize("plain", [{"mean": 1.0}, {"mean": 1.0, "var": 1.0, "x": 1}, [1.0, 1.0], None, 3])
def test_other_fields_are_named(plain: Any) -> None:
    """Bug: a state of another version that is half loaded; or a message that does not say what is different."""
    found = sorted(plain) if isinstance(plain, dict) else type(plain).__name__
    with pytest.raises(ValueError, match="fields") as error:
        from_plain(Ema, plain)
    assert str(error.value) == f"Ema: expected the fields ['mean', 'var'], got {found}"


@pytest.mark.parametrize("plain", [None, 3, "abc", {"a": 1}])
def test_a_tuple_must_be_a_list(plain: Any) -> None:
    """Bug: a TypeError from inside, or a string taken apart into letters."""
    with pytest.raises(ValueError, match=rf"expected a list, got {type(plain).__name__}$"):
        from_plain(Window, {"values": plain, "ordered": []})


class Single(NamedTuple):
    single: tuple[int]
    triple: tuple[int, int, int] = (1, 2, 3)


def test_tuples_of_one_and_of_three_items() -> None:
    """Bug: a tuple of fixed length taken for one of any length."""
    assert from_plain(Single, to_plain(Single((1,)))) == Single((1,))


class Pair(NamedTuple):
    pair: tuple[int, Ema]


@pytest.mark.parametrize("items", [[], [1], [1, {"mean": 1.0, "var": 1.0}, 3]])
def test_a_tuple_of_another_length_is_refused(items: list[Any]) -> None:
    """Bug: a state of another version that is cut to the length of this one."""
    with pytest.raises(ValueError, match=rf"expected 2 items, got {len(items)}$"):
        from_plain(Pair, {"pair": items})
