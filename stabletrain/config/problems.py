"""Mistakes in a config: pairs of a key and a message, collected so that all of them are shown at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from stabletrain.errors import UserError

MOST_SHOWN = 20
"""Mistakes in a message; a file that is no recipe at all has hundreds."""
_LONGEST_KEY, _LONGEST_TEXT = 400, 2000


@dataclass(frozen=True)
class Problem:
    """One mistake in a config.

    Args:
        key: the full config key, or the override as typed.
        text: what was expected, what was given, and what to do.
    """

    key: str
    text: str

    def __str__(self) -> str:
        return f"{_shown(self.key, _LONGEST_KEY)}: {_shown(self.text, _LONGEST_TEXT)}"


class ConfigError(UserError):
    """A config has mistakes; ``problems`` lists all of them, the message the first `MOST_SHOWN`."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:MOST_SHOWN]]
        if len(self.problems) > MOST_SHOWN:
            lines.append(f"... and {len(self.problems) - MOST_SHOWN} more")
        super().__init__("\n".join(lines))


def _shown(text: str, longest: int) -> str:
    """Return a text on one line, without control characters, and shortened in the middle."""
    if not text.isprintable():
        text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    return text if len(text) <= longest else f"{text[: longest // 2]} [...] {text[-longest // 4 :]}"


def suggestion(word: str, known: Iterable[str], *, list_all: bool = True) -> str:
    """Return the end of a message about an unknown word: the most similar known word, or all known words.

    Args:
        word: as typed.
        known: the known words.
        list_all: whether to list all known words if none is similar; otherwise the clause is empty then.

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
