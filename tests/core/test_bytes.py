"""Amounts of memory: parsed exactly, and printed in the largest unit that fits."""

import pytest

from stabletrain.core import bytes as memory


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
    ],
)
def test_amounts_in_every_unit(text: str, amount: float) -> None:
    """Bugs: a decimal unit taken for a binary one; a unit in lower case refused."""
    assert memory.parse(text) == amount


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "1 XB", "1iB", "1e3GB", "1.GB", ".5GB", "1GB/s", "1 GB 2", ""])
def test_other_texts_are_not_understood(text: str) -> None:
    """Bugs: a number without a unit taken for bytes; trailing text ignored."""
    assert memory.parse(text) is None


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
