"""The hash of a recipe, to detect that a checkpoint was saved with another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
import yaml

from stabletrain.runtime.records.regular_file import only_regular
from stabletrain.runtime.records.run_files import RUN_YAML, RUN_YAML_RECORD

_NOT_TRAINED = ("run_dir", "resume", "logger", "launch", "callbacks", "dry_run", "memory", "runtime", *RUN_YAML_RECORD)
"""Keys that are excluded from the hash: they say where and how a run is executed and logged."""
_MOST_BYTES = 2**20
_MOST_VALUES = 20_000
"""With aliases written out, of which a few lines can stand for billions of values."""


def recipe_hash(folder: Path, but: tuple[str, ...] = ()) -> str | None:
    """Return a hash of the keys in a run's ``run.yaml`` that determine the training; None if it cannot be read.

    Args:
        folder: the run's folder.
        but: further keys to exclude.
    """
    try:
        content = yaml.safe_load(_read(folder / RUN_YAML))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    if not isinstance(content, dict) or not _is_small(content):
        return None
    trained = {key: value for key, value in content.items() if key not in (*_NOT_TRAINED, *but)}
    plugins = trained.get("plugins")
    if isinstance(plugins, dict):
        trained["plugins"] = {slot: _without_replay(node) for slot, node in plugins.items()}
    guard = trained.pop("guard", None)
    if isinstance(guard, dict) and guard.get("mode", "auto") != "auto":  # the other options change no weight
        trained["guard"] = guard["mode"]
    return xxhash.xxh3_128(json.dumps(trained, sort_keys=True, default=str).encode()).hexdigest()


def _read(file: Path) -> str:
    """Return the text of a regular file that is not large."""
    with open(file, "rb", opener=only_regular) as opened:
        content = opened.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{file} is larger than {_MOST_BYTES} bytes")
    return content.decode("utf-8")


def _is_small(content: object) -> bool:
    """Whether a content can be walked through; one that contains itself cannot."""
    waiting, count = [content], 0
    while waiting and count <= _MOST_VALUES:
        count += 1
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    return not waiting


def _without_replay(node: Any) -> Any:
    """A plugin's node without ``replay``, so that a run may replay the interventions of another run."""
    return {key: value for key, value in node.items() if key != "replay"} if isinstance(node, dict) else node
