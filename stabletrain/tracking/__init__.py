"""Runs in MLflow: the store, the run's record, the Lightning logger, and the comparison of runs.

Importing this package is cheap: every name is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabletrain.lazy import lazy_exports

if TYPE_CHECKING:
    from stabletrain.tracking.addresses import comparison_url
    from stabletrain.tracking.comparison import Comparison, RunSummary, compare, side_by_side
    from stabletrain.tracking.git import git_state
    from stabletrain.tracking.logger import MLflowLogger
    from stabletrain.tracking.record import environment, write_environment
    from stabletrain.tracking.runs import set_final_status, start_run, upload_unsent
    from stabletrain.tracking.store import default_tracking_uri, ensure_store
    from stabletrain.tracking.store_errors import StoreError

_MODULES = {
    "Comparison": "comparison",
    "MLflowLogger": "logger",
    "RunSummary": "comparison",
    "StoreError": "store_errors",
    "compare": "comparison",
    "comparison_url": "addresses",
    "default_tracking_uri": "store",
    "ensure_store": "store",
    "environment": "record",
    "git_state": "git",
    "set_final_status": "runs",
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
    "set_final_status",
    "side_by_side",
    "start_run",
    "upload_unsent",
    "write_environment",
]

__getattr__ = lazy_exports(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
