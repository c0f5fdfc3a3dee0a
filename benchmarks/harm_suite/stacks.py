"""The compared protections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning import Callback

import stabletrain as st


@dataclass(frozen=True)
class Stack:
    """A set of callbacks.

    Args:
        name: in the table.
        build: makes new callbacks.
        note: explanation for the result page.
    """

    name: str
    build: Callable[[], list[Callback]]
    note: str


NOTHING, DEFAULT = "nothing", "default"
STACKS = (
    Stack(NOTHING, list, "no callback: the bare run, against which the others are judged"),
    Stack(DEFAULT, st.default_callbacks, "`stabletrain.default_callbacks()`"),
    Stack(
        "default without rollback",
        lambda: st.default_callbacks(spike="none"),
        '`stabletrain.default_callbacks(spike="none")`',
    ),
    Stack("clip_norm(1.0)", lambda: [st.ClipNorm(max_norm=1.0)], "`stabletrain.ClipNorm(max_norm=1.0)`"),
)
