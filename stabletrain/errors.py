"""The base class of errors that the user can correct: shown as one message, without a traceback."""

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
