"""What a failed check says."""

from __future__ import annotations

from typing import NoReturn


class CheckFailed(AssertionError):
    """A plugin does not keep the contract; the message names the check, the plugin, what was expected and found.

    Args:
        check: name of the check.
        plugin: name of the plugin.
        expected: what the contract asks for.
        got: what was found.
    """

    def __init__(self, check: str, plugin: str, expected: str, got: str) -> None:
        super().__init__(f"plugin {plugin!r} fails the check {check!r}: expected {expected}, got {got}")
        self.check = check
        self.plugin = plugin
        self.expected = expected
        self.got = got

    def __reduce__(self) -> tuple[type[CheckFailed], tuple[str, str, str, str]]:
        return type(self), (self.check, self.plugin, self.expected, self.got)


class Wrong(Exception):
    """Raised inside a check, which does not know its own name: the pair (expected, got)."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)
        self.expected = expected
        self.got = got


def wrong(expected: str, got: str) -> NoReturn:
    """Fail the check that is running."""
    raise Wrong(expected, got)
