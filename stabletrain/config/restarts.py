"""How often a run is restarted after a death, from the keys ``launch.restarts`` and ``launch.progress_steps``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_RESTARTS = 3
"""Of ``launch.restarts=null``, for a run with checkpoints."""
WITHOUT_CHECKPOINTS = "a restart would begin anew, without checkpoints: add plugins/checkpoints=save"
_DEFAULT_PROGRESS = 200
"""Of a run.yaml without ``launch.progress_steps``."""


def allowed_restarts(config: Mapping[str, Any]) -> tuple[int, str]:
    """Return how many restarts without progress a run has, and if there are none, why; empty: nobody wanted any.

    Args:
        config: composed, or the content of run.yaml.
    """
    wanted = config["launch"].get("restarts", 0)  # missing in a run.yaml of an earlier version
    if wanted == 0:
        return 0, ""
    missing = missing_for_restarts(config)
    if missing:
        return 0, missing
    return DEFAULT_RESTARTS if wanted is None else int(wanted), ""


def missing_for_restarts(config: Mapping[str, Any]) -> str:
    """Return what a run lacks, so that a restart could not go on where it was; empty if nothing.

    Args:
        config: composed, or the content of run.yaml.
    """
    plugins = config.get("plugins")
    node = plugins.get("checkpoints") if isinstance(plugins, Mapping) else None
    if not isinstance(node, Mapping):
        return WITHOUT_CHECKPOINTS
    if node.get("folder") is not None:
        return (
            "a restart goes on from the checkpoints in the run's folder: leave plugins.checkpoints.folder=null, and "
            "choose the run's folder by run_dir"
        )
    return ""


def progress_steps(config: Mapping[str, Any]) -> int:
    """Return how many steps a run must come further, so that its restarts count from the beginning again.

    Args:
        config: composed, or the content of run.yaml.
    """
    return int(config["launch"].get("progress_steps", _DEFAULT_PROGRESS))


def restarts_problem(config: Mapping[str, Any]) -> str:
    """Return what is wrong with an explicit ``launch.restarts``; empty if nothing.

    Args:
        config: composed; its values have the right types.
    """
    wanted = config["launch"].get("restarts")
    if not isinstance(wanted, int):
        return ""
    if wanted < 0:
        return f"expected at least 0, or null, got {wanted}"
    missing = missing_for_restarts(config) if wanted else ""
    return f"{missing}; or launch.restarts=0" if missing else ""
