"""The one class of errors that are a user's mistake: shown as one message, without a traceback."""


class UserError(ValueError):
    """Something the user can put right: the message says what, what was expected, what was got, and what to do."""


def require(ok: bool, owner: str, argument: str, expected: str, got: object, key: str) -> None:
    """Refuse an argument with one message that names it and its config key.

    Args:
        ok: whether the argument is accepted.
        owner: who has the argument: a plugin's name, or a class.
        argument: its name.
        expected: what is accepted, after "must be".
        got: the value.
        key: the config node that holds the argument, such as ``plugins.clip``.

    Raises:
        UserError: unless ``ok``.

    >>> require(False, "clip_norm", "max_norm", "> 0", -1.0, "plugins.clip")
    Traceback (most recent call last):
    ...
    stabletrain.errors.UserError: clip_norm: max_norm must be > 0, got -1.0 (config key plugins.clip.max_norm)
    """
    if not ok:
        raise UserError(f"{owner}: {argument} must be {expected}, got {got!r} (config key {key}.{argument})")
