"""Wrap the forward pass of one module instance; several wrappers may be removed in any order."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

_BELOW = "_stabletrain_below"

Around = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called with the module, its forward pass, and the arguments; returns the output."""


def wrap_forward(module: nn.Module, around: Around) -> Callable[[], None]:
    """Call ``around`` in place of a module's forward pass; of a copy of the module too, with the copy's weights.

    Args:
        module: of which the instance is changed, and not the class.
        around: see `Around`.

    Returns:
        A function that removes this wrapper, also if another one was added later.
    """
    below = [module.__dict__.get("forward")]  # what this wrapper calls; None: the method of the class

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = below[0]
        if inner is None:
            inner = types.MethodType(type(self).forward, self)
        elif getattr(inner, "__self__", None) is module:
            inner = types.MethodType(inner.__func__, self)
        return around(self, inner, args, kwargs)

    shown = type(module).forward if below[0] is None else getattr(below[0], "__func__", None)
    if shown is not None:  # for callers that look at the signature
        functools.update_wrapper(forward, shown)
    setattr(forward, _BELOW, below)
    # a bound method: a copy of the module gets one that is bound to the copy
    bound = types.MethodType(forward, module)
    module.__dict__["forward"] = bound

    def undo() -> None:
        current = module.__dict__.get("forward")
        if current is bound:
            del module.__dict__["forward"]
            if below[0] is not None:
                module.__dict__["forward"] = below[0]
            return
        while (above := getattr(getattr(current, "__func__", None), _BELOW, None)) is not None:
            if above[0] is bound:
                above[0] = below[0]
                return
            current = above[0]

    return undo
