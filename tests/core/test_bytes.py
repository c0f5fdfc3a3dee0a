"""Amounts of memory: parsed exactly, refused with the config key, and printed in the largest unit that fits."""

from typing import Any

import pytest

from stabletrain.core import bytes as memory
from stabletrain.errors import UserError


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("8GB", 8e9),
        (" 0.5 MiB ", 2**19),
        ("3kb", 3e3),
        ("2TB", 2e12),
        ("7 b", 7),
        ("1KiB", 2**10),
        ("1.5gib", 1.5 * 2**30),
        ("1TIB", 2**40),
        ("1e3KB", 1e6),
        ("0B", 0),
    ],
)
def test_amounts_in_every_unit(text: str, amount: float) -> None:
    """Bugs: a decimal unit taken for a binary one; "8GiB" read as "8Gi" bytes, because it also ends with "B"."""
    assert memory.parse(text) == amount


WRONG: list[Any] = [
    "8",
    "GB",
    "-1GB",
    "1 XB",
    "1iB",
    "1GB/s",
    "1 GB 2",
    "",
    "8 parsecs",
    "nanGB",
    "infB",
    8,
    None,
    True,
]


@pytest.mark.parametrize("value", WRONG)
def test_other_values_are_refused_with_the_key(value: Any) -> None:
    """Bugs: a number without a unit taken for bytes; trailing text ignored; a limit of NaN, which nothing exceeds."""
    with pytest.raises(UserError, match=r"^plugins\.x\.max_memory: expected an amount of memory like '8GB' .*, got "):
        memory.parse(value, name="plugins.x.max_memory")


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1234, "1.23 KB"),
        (1e6, "1 MB"),
        (8.04e9, "8.04 GB"),
        (1e12, "1 TB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_an_amount_is_printed_in_the_largest_unit_that_fits(amount: float, text: str) -> None:
    """Bug: 1000 bytes shown as bytes, or divided by the wrong unit."""
    assert memory.shown(amount) == text
