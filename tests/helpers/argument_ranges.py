"""Check of an argument's range: accepted at its ends, refused beyond them, with the whole message."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from stabletrain.errors import UserError
from stabletrain.settings import by_config


def check_range(
    make: Callable[..., Any],
    owner: str,
    node: str,
    argument: str,
    expected: str,
    accepted: Iterable[dict[str, Any]],
    refused: Iterable[dict[str, Any]],
) -> None:
    """Catches a range that is off by one or open at the wrong end, and a message with the wrong name, range or key.

    Args:
        make: the constructor.
        owner: the name that the message begins with.
        node: the config node that the message names.
        argument: the argument that the message names.
        expected: the range in the message.
        accepted: arguments at the ends of the range.
        refused: arguments just beyond it.
    """
    for arguments in accepted:
        make(**arguments)
    for arguments in refused:
        with pytest.raises(UserError) as error, by_config():
            make(**arguments)
        got = arguments[argument]
        message = f"{owner}: {argument} must be {expected}, got {got!r} (config key {node}.{argument})"
        assert str(error.value) == message
