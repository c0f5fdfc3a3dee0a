"""The hash of a recipe, to detect that a checkpoint was saved with another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
import yaml

from stabletrain.runtime.records.run_files import RUN_YAML

_NOT_TRAINED = ("run_dir", "resume", "logger", "launch", "trust", "callbacks", "choices", "dry_run")
"""Keys that are excluded from the hash: they say where and how a run is executed and logged."""


def recipe_hash(folder: Path, but: tuple[str, ...] = ()) -> str | None:
    """Return a hash of the keys in a run's ``run.yaml`` that determine the training; None if it cannot be read.

    Args:
        folder: the run's folder.
        but: further keys to exclude.
    """
    try:
        content = yaml.safe_load((folder / RUN_YAML).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(content, dict):
        return None
    trained = {key: value for key, value in content.items() if key not in (*_NOT_TRAINED, *but)}
    plugins = trained.get("plugins")
    if isinstance(plugins, dict):
        trained["plugins"] = {slot: _without_replay(node) for slot, node in plugins.items()}
    guard = trained.pop("guard", None)
    if isinstance(guard, dict) and guard.get("mode", "auto") != "auto":  # the other options change no weight
        trained["guard"] = guard["mode"]
    return xxhash.xxh3_128(json.dumps(trained, sort_keys=True, default=str).encode()).hexdigest()


def _without_replay(node: Any) -> Any:
    """A plugin's node without ``replay``, so that a run may replay the interventions of another run."""
    return {key: value for key, value in node.items() if key != "replay"} if isinstance(node, dict) else node
