"""For authors of plugins: the conformance check, and series of losses and gradient norms to test a rule on.

    from stabletrain.testing import check_plugin

    def test_conformance() -> None:
        check_plugin("clip_cool")

Importing this package is cheap: every name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabletrain.core.rule import replay as replay
    from stabletrain.testing import series as series
    from stabletrain.testing.conformance import check_plugin as check_plugin
    from stabletrain.testing.failure import CheckFailed as CheckFailed

_EXPORTS = {
    "CheckFailed": "stabletrain.testing.failure:CheckFailed",
    "check_plugin": "stabletrain.testing.conformance:check_plugin",
    "replay": "stabletrain.core.rule:replay",
    "series": "stabletrain.testing.series:",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'stabletrain.testing' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    found = importlib.import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value
