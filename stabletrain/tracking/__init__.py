"""Runs in MLflow: the store, the run's record, the Lightning logger, and comparing runs. Light to import."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabletrain.tracking.comparison import Comparison, RunSummary, compare, comparison_url, side_by_side
    from stabletrain.tracking.logger import MLflowLogger
    from stabletrain.tracking.record import environment, git_state, write_environment
    from stabletrain.tracking.runs import settle, start_run, upload_unsent
    from stabletrain.tracking.store import StoreError, default_tracking_uri, ensure_store

_HOMES = {
    "Comparison": "comparison",
    "MLflowLogger": "logger",
    "RunSummary": "comparison",
    "StoreError": "store",
    "compare": "comparison",
    "comparison_url": "comparison",
    "default_tracking_uri": "store",
    "ensure_store": "store",
    "environment": "record",
    "git_state": "record",
    "settle": "runs",
    "side_by_side": "comparison",
    "start_run": "runs",
    "upload_unsent": "runs",
    "write_environment": "record",
}

__all__ = [
    "Comparison",
    "MLflowLogger",
    "RunSummary",
    "StoreError",
    "compare",
    "comparison_url",
    "default_tracking_uri",
    "ensure_store",
    "environment",
    "git_state",
    "settle",
    "side_by_side",
    "start_run",
    "upload_unsent",
    "write_environment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
