"""A plugin's state in a checkpoint may be any data: what cannot be restored is one message that names the plugin."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from stabletrain.errors import UserError

FOREIGN_STATE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
"""What code raises that is given a state of another form; a `UserError`, which is a ValueError, says more already."""

Load = Callable[[Any, dict[str, Any]], None]


def names_its_plugin(load: Load) -> Load:
    """Decorate a callback's ``load_state_dict``: it raises a `UserError` for a state that it cannot restore.

    Args:
        load: the method; its object has a ``state_key``.
    """

    @functools.wraps(load)
    def load_or_explain(self: Any, state_dict: dict[str, Any]) -> None:
        try:
            if not isinstance(state_dict, Mapping):
                raise TypeError(f"expected a dict, got {type(state_dict).__name__}")
            load(self, state_dict)
        except UserError:
            raise
        except FOREIGN_STATE as error:
            problem = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{self.state_key}: its state in the checkpoint cannot be restored ({problem}). Another plugin or "
                "version made it, or it was changed: use another checkpoint, or start from scratch (config key resume)"
            ) from error

    return load_or_explain
