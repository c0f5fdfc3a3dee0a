"""Amounts of memory as text."""

from typing import Any

import pytest

from stabletrain.core.bytes import parse, shown
from stabletrain.errors import UserError


@pytest.mark.parametrize(
    ("written", "amount"),
    [("8GB", 8e9), (" 0.5 MiB ", 2**19), ("512b", 512), ("1e3KB", 1e6), ("2 tib", 2**41), ("0B", 0), ("1.5kib", 1536)],
)
def test_units_of_1000_and_of_1024_in_any_case(written: str, amount: float) -> None:
    """Bug: "8GiB" read as "8Gi" bytes, because it also ends with "B"."""
    assert parse(written) == amount


@pytest.mark.parametrize("written", ["8", "", "GB", "8G", "8 parsecs", "nanGB", "infB", "-1GB", 8, None, True])
def test_anything_else_is_refused_with_the_key(written: Any) -> None:
    """Bug: a limit of NaN bytes, which no amount exceeds."""
    with pytest.raises(UserError, match=r"^plugins\.x\.max_memory: expected an amount of memory like '8GB' .*, got "):
        parse(written, name="plugins.x.max_memory")


@pytest.mark.parametrize(("amount", "text"), [(8.04e9, "8.04 GB"), (999.0, "999 B"), (1e3, "1 KB"), (2.5e13, "25 TB")])
def test_amounts_are_shown_with_three_digits(amount: float, text: str) -> None:
    assert shown(amount) == text
