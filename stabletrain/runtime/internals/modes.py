"""Function modes that are left in any order, and tensors that only live inside a transform."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


def enter(mode: TorchFunctionMode) -> Callable[[], None]:
    """Open a function mode; returns what closes it, also while a mode that was opened later is still open.

    ``mode.__exit__`` closes whatever mode was opened last. A hook of Lightning may be called within a mode of the
    module, such as ``with torch.device(...)`` around ``manual_backward``, which must stay open.
    """
    mode.__enter__()  # type: ignore[no-untyped-call]

    def leave() -> None:
        if not any(each is mode for each in open_function_modes()):
            return
        later = []
        while (last := _pop_mode()) is not mode:  # type: ignore[no-untyped-call]
            later.append(last)
        for each in reversed(later):
            _push_mode(each)  # type: ignore[no-untyped-call]

    return leave


def open_function_modes() -> list[TorchFunctionMode]:
    """The function modes that are open in this thread, the last opened one last."""
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def is_inside_transform(tensor: Tensor) -> bool:
    """Whether a tensor belongs to ``torch.func.grad``, ``vmap`` and the like, and must not be kept beyond them."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
