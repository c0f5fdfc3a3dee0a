"""The hash of a recipe, so that a checkpoint can say that it was made with another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
import yaml

from stabletrain.runtime.records.run_files import RUN_YAML

_OF_ONE_RUN = ("run_dir", "resume", "logger", "launch", "trust", "callbacks", "choices", "dry_run")
"""Where a run is, and how it is watched: not what is trained."""


def recipe_hash(folder: Path, but: tuple[str, ...] = ()) -> str | None:
    """Hash what is trained, by the ``run.yaml`` of a run's folder; None if there is none that can be read.

    Args:
        folder: the run's folder.
        but: further keys that may differ.
    """
    try:
        content = yaml.safe_load((folder / RUN_YAML).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(content, dict):
        return None
    trained = {key: value for key, value in content.items() if key not in (*_OF_ONE_RUN, *but)}
    plugins = trained.get("plugins")
    if isinstance(plugins, dict):
        trained["plugins"] = {slot: _without_replay(node) for slot, node in plugins.items()}
    return xxhash.xxh3_128(json.dumps(trained, sort_keys=True, default=str).encode()).hexdigest()


def _without_replay(node: Any) -> Any:
    """A plugin's node; a run that repeats another's interventions trains the same."""
    return {key: value for key, value in node.items() if key != "replay"} if isinstance(node, dict) else node
