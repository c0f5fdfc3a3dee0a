"""What can be wrong with a config: a key and a sentence each, collected so that all of them are shown at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from stabletrain.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One mistake in a config.

    Args:
        key: the full config key, or the override as typed.
        text: what is wrong, what was expected, and what to do.
    """

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


class ConfigError(UserError):
    """A config cannot be used; ``problems`` holds every mistake found in it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def suggestion(word: str, known: Iterable[str], *, list_all: bool = True) -> str:
    """Return a clause that helps after a word nobody knows: the nearest known one, or all of them.

    Args:
        word: what was typed.
        known: what could have been meant.
        list_all: whether all known words are named when none is near.

    >>> suggestion("zscor", ["none", "zscore"])
    "; did you mean 'zscore'?"
    >>> suggestion("x", ["none", "zscore"])
    '; choose one of: none, zscore'
    """
    names = [str(name) for name in known]
    near = get_close_matches(word.lower().replace("-", "_"), names, 1, 0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose one of: {', '.join(names)}" if names and list_all else ""
