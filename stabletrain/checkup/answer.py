"""What a check answers: fine, finding, or not applicable, with a text that holds its numbers."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["finding", "not applicable", "fine"]
KINDS: tuple[Kind, ...] = ("finding", "not applicable", "fine")
"""The kinds of answers, the worst first."""


class Answer(NamedTuple):
    """One answer.

    Args:
        kind: of it.
        text: what was measured, or why nothing was; may be empty.
        details: such as the whole traceback of an exception; empty: none.
    """

    kind: Kind
    text: str
    details: str = ""


def fine(text: str = "") -> Answer:
    """Nothing is wrong.

    Args:
        text: what was measured.
    """
    return Answer("fine", text)


def finding(text: str, details: str = "") -> Answer:
    """Something is above its threshold.

    Args:
        text: what was measured.
        details: see `Answer`.
    """
    return Answer("finding", text, details)


def not_applicable(why: str) -> Answer:
    """The check cannot judge this module or this data.

    Args:
        why: the reason.
    """
    return Answer("not applicable", why)
