"""Positions in a run, given as a list of lengths from its start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stabletrain.core.lengths import Length, LengthLike, RunLength
from stabletrain.errors import UserError

_FORMS = "[600, '3ep', '10%'] (applied steps, epochs, percent of the run)"


def parse(given: Sequence[LengthLike], *, name: str) -> tuple[Length, ...]:
    """Read a list of positions after the start of a run.

    Args:
        given: lengths in steps, epochs or percent, each above 0 and given once.
        name: the config key, for messages.

    Raises:
        UserError: if it is no list, or an element is no such length.

    >>> [str(each) for each in parse([600, "3ep"], name="expect")]
    ['600', '3ep']
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UserError(f"{name}: expected a list of positions such as {_FORMS}, got {given!r}")
    found: list[Length] = []
    for each in given:
        try:
            length = Length.parse(each, name=name)
        except UserError:
            length = None
        if length is None or length.unit == "tokens" or not length.value > 0:
            raise UserError(f"{name}: expected positions after the start of the run, such as {_FORMS}, got {each!r}")
        if length in found:
            raise UserError(f"{name}: expected different positions, got {each!r} twice")
        found.append(length)
    return tuple(found)


def resolve(positions: Iterable[Length], run: RunLength, *, name: str) -> dict[int, Length]:
    """The positions in applied steps.

    Args:
        positions: as returned by `parse`.
        run: what is known about the run; without ``total_steps`` it is not checked whether a position comes.
        name: the config key, for messages.

    Raises:
        UserError: if a position cannot be turned into steps, or comes after the last step.

    >>> resolve(parse([600, "3ep"], name="expect"), RunLength(steps_per_epoch=100), name="expect")
    {600: Length(value=600, unit='steps'), 300: Length(value=3, unit='epochs')}
    """
    found: dict[int, Length] = {}
    for length in positions:
        step = length.resolve(run, name=name)
        if run.total_steps is not None and step >= run.total_steps:
            raise UserError(
                f"{name}: expected positions before the end of the run, after {run.total_steps} steps, got "
                f"{_named(step, length)}, which never comes: remove it, or train longer"
            )
        found[step] = length
    return found


def _named(step: int, length: Length) -> str:
    return f"{step}" if length.unit == "steps" else f"{str(length)!r}, step {step}"
