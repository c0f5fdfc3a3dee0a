"""The exceptions of a failed check."""

from __future__ import annotations

from typing import NoReturn


class CheckFailed(AssertionError):
    """A plugin failed a check; the message names the check, the plugin, what was expected and what was found.

    Args:
        check: name of the check.
        plugin: name of the plugin.
        expected: what the check requires.
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
    """Raised inside a check; `run_check` turns it into a `CheckFailed` with the names of check and plugin."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)
        self.expected = expected
        self.got = got


def wrong(expected: str, got: str) -> NoReturn:
    """Fail the running check."""
    raise Wrong(expected, got)
