"""Which submodule's forward pass is running."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class RunningModules:
    """Follows the forward passes of named modules while its hooks are there.

    Args:
        names: of the modules that are followed.
        hooked: modules to put the hooks on, of those that are followed; None: they are hooks on all modules, of which
            what torch.compile returns warns.
        returned: called with the name of a module that has returned, and its output.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        hooked: Iterable[nn.Module] | None,
        returned: Callable[[str, Any], None] = lambda name, output: None,
    ) -> None:
        self._names, self._returned = names, returned
        self._hooked = None if hooked is None else list(hooked)
        self._running: list[str] = []

    @property
    def current(self) -> str:
        """Name of the innermost one that is running; empty if none is."""
        return self._running[-1] if self._running else ""

    def follow(self, until: ExitStack) -> None:
        """Put the hooks there.

        Args:
            until: takes them away again when it is closed.
        """
        self._running.clear()
        # called after an exception too, so that the names are right if the module catches it
        if self._hooked is None:
            until.callback(register_module_forward_pre_hook(self._enter).remove)
            until.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            return
        for each in self._hooked:
            until.callback(each.register_forward_pre_hook(self._enter).remove)
            until.callback(each.register_forward_hook(self._leave, always_call=True).remove)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._names:
            self._running.append(self._names[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._names and self._running:
            self._returned(self._running.pop(), output)
