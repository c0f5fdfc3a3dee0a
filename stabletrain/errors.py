"""The base class of errors that the user can correct: shown as one message, without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches

from stabletrain.settings import worded


class UserError(ValueError):
    """A mistake of the user: the message says what is wrong, what was expected, what was given, and what to do."""


def require(
    ok: bool, owner: str, argument: str, expected: str, got: object, key: str, named: str | None = None
) -> None:
    """Raise an error that names an argument and its config key, unless the argument is valid.

    Args:
        ok: whether the argument is valid.
        owner: name of the plugin or class with the argument.
        argument: its name.
        expected: the valid values; follows "must be" in the message.
        got: the value.
        key: the config node that holds the argument, such as ``plugins.clip``.
        named: name of the class of a plugin, as a script knows it; None: ``owner``.

    Raises:
        UserError: unless ``ok``.

    >>> require(False, "clip_norm", "max_norm", "> 0", -1.0, "plugins.clip", "ClipNorm")
    Traceback (most recent call last):
    ...
    stabletrain.errors.UserError: clip_norm: max_norm must be > 0, got -1.0 (ClipNorm(max_norm=...))
    """
    if not ok:
        text = f"{owner}: {argument} must be {expected}, got {got!r} (config key {key}.{argument})"
        raise UserError(worded(text, key.removeprefix("plugins."), named or owner))


def is_number(value: object) -> bool:
    """Whether an argument is a number, and no truth value; NaN and infinity are numbers.

    >>> is_number(1.5), is_number("1.5"), is_number(True)
    (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether an argument is a whole number, as an ``int`` or as a ``float`` such as 1e3.

    >>> is_whole(3), is_whole(1e3), is_whole(2.5), is_whole(float("inf")), is_whole("3"), is_whole(True)
    (True, True, False, False, False, False)
    """
    return is_number(value) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name; empty if no known one is similar.

    >>> did_you_mean("beta", ["betas", "lr"])
    "; did you mean 'betas'?"
    """
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
