"""Where the config lets a run write: below the run's folder, and elsewhere only what the command line names.

Outside of ``model``, ``data`` and ``resume``, whose paths are read, a path that leaves the run's folder (absolute, with
``~`` or ``..``, or an address) is accepted only if its key was set on the command line. A relative path of an argument
that names a file or folder lies in the run's folder, or, set on the command line, in the current one.

Options of ``sbatch`` say where a job writes, too, and what its environment is: a file may set only those that ask for
resources.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from stabletrain.config.problems import Problem

_WRITING_KEYS = (
    "run_dir", "plugins", "callbacks", "schedule", "chaos", "logger", "guard", "trainer", "precision", "strategy",
    "launch",
)  # fmt: skip
_FOLDERS = frozenset({"default_root_dir", "dir", "dirpath", "events", "folder", "root_dir", "save_dir", "spill"})
"""Arguments that name a file or folder to write, whatever their annotation."""
_ADDRESSES = ("uri", "url", "location")
"""Endings of the names of arguments that say where a tracking server or store is."""
_READ = frozenset({"replay"})
"""Arguments that name a file to read."""
_RESOURCES = """
account begin clusters comment constraint contiguous core-spec cores-per-socket cpus-per-gpu cpus-per-task deadline
dependency distribution exclude exclusive extra-node-info gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
gpus-per-task gres gres-flags hint job-name licenses mem mem-bind mem-per-cpu mem-per-gpu mincpus nice no-requeue
nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket overcommit oversubscribe
partition prefer priority qos requeue reservation signal sockets-per-node spread-job switches thread-spec
threads-per-core time time-min tmp use-min-nodes wckey
"""
_SBATCH = frozenset(_RESOURCES.split())
"""Options of sbatch that any file may set; ``--export=ALL,LD_PRELOAD=...`` would run code."""
_MOST_FILES = 10_000
"""In a folder that is there already when a recipe makes it the run's."""
_ADVICE = "which only the command line may set; if you want it, add {key}={value}"
_CHARACTER = re.compile(r"\{[^{}]*:[^{}]*(?:\{|c\})")
"""In a format such as that of a checkpoint's name: the character with a number. The 46th is a dot, the 47th a slash."""


def check_outputs(config: Mapping[str, Any], typed: Collection[str], advice: str = _ADVICE) -> Iterator[Problem]:
    """Yield every path that leaves the run's folder, and every option of sbatch that may run code.

    Args:
        config: a composed config, or parts of one.
        typed: the keys that were set on the command line, which are not checked.
        advice: how the user can have them nevertheless.
    """
    run_dir = config.get("run_dir")
    if isinstance(run_dir, str) and "run_dir" not in typed and not _leaves(run_dir):
        yield from _run_folder(Path(run_dir))
    for top in _WRITING_KEYS:
        for key, value in _texts(config.get(top), top):
            name = key.rpartition(".")[2].partition("[")[0]
            leaves = _leaves(value) or (name.endswith(_ADDRESSES) and value)
            if leaves and name not in _READ and not _was_typed(key, typed):
                wanted = advice.format(key=key, value=value)
                yield Problem(key, f"expected a path below the run's folder, got {value!r:.200}, {wanted}")
    launch = config.get("launch")
    sbatch = launch.get("sbatch") if isinstance(launch, Mapping) else None
    for option, value in sbatch.items() if isinstance(sbatch, Mapping) else ():
        key = f"launch.sbatch.{option}"
        if option not in _SBATCH and key not in typed:
            wanted = advice.format(key=key, value=value)
            yield Problem(key, f"expected an option that asks for resources, got {option!r:.100}, {wanted}")


def _run_folder(folder: Path) -> Iterator[Problem]:
    """Yield what is wrong with a run's folder that somebody may have prepared: links would lead the run elsewhere."""
    here = os.path.realpath(Path.cwd())
    if not _is_below(folder, here):
        yield Problem("run_dir", f"expected a folder below {here}, got a link to {os.path.realpath(folder)}")
        return
    count = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path, count = Path(parent, name), count + 1
            if path.is_symlink() and not _is_below(path, os.path.realpath(folder)):
                yield Problem("run_dir", f"{path} is a link out of the run's folder; choose another folder")
                return
            if not path.is_dir() and not path.is_file() and not path.is_symlink():
                yield Problem("run_dir", f"expected files and folders in {folder}, got {path}; choose another folder")
                return
        if count > _MOST_FILES:
            yield Problem("run_dir", f"{folder} contains more than {_MOST_FILES} files; choose another folder")
            return


def _is_below(path: Path, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(folder)


def typed_keys(overrides: Sequence[str]) -> frozenset[str]:
    """Return the keys whose values were set on the command line; a choice of an option sets none.

    Args:
        overrides: as typed.

    >>> sorted(typed_keys(["seed=1", "plugins/clip=norm", "++callbacks={x: {dirpath: /a}}"]))
    ['callbacks.x.dirpath', 'seed']
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found: set[str] = set()
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except HydraException:  # reported already
            continue
        if not override.is_delete() and "/" not in override.key_or_group:
            found |= set(_leaf_keys(override.value(), override.key_or_group))
    return frozenset(found)


@dataclass(frozen=True)
class Outputs:
    """Where the relative paths of a run's files are.

    Args:
        folder: the run's folder.
        typed: the keys that were set on the command line.
    """

    folder: Path
    typed: frozenset[str]

    def place(self, key: str, value: Any, hints: Iterable[Any] = ()) -> Any:
        """Return an argument; if it is a relative path of something to write, with the folder that it lies in.

        Args:
            key: its config key.
            value: any value.
            hints: from its annotation.
        """
        name = key.rpartition(".")[2]
        is_path = name in _FOLDERS or any(map(_is_path, hints))
        if not isinstance(value, str) or not is_path or name in _READ or "://" in value:
            return value
        folder = Path.cwd() if _was_typed(key, self.typed) else self.folder
        return str(folder / Path(value).expanduser())


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name != "_target_":
                yield from _texts(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{index}]")


def _leaves(value: str) -> bool:
    """Whether a text, read as a path, leads out of the folder that it is relative to.

    >>> [_leaves(each) for each in ("/a", "~/a", "a/../b", "file:///a", "a::b", "val/loss", "a..b")]
    [True, True, True, True, True, False, False]
    >>> [_leaves(each) for each in ("{step:c}", "{step:{epoch}c}", "{epoch:02d}-{acc:.2f}")]
    [True, True, False]
    """
    if _CHARACTER.search(value):
        return True
    parts = value.replace("\\", "/").split("/")
    return value.startswith(("/", "\\", "~")) or ".." in parts or "://" in value or "::" in value


def _was_typed(key: str, typed: Collection[str]) -> bool:
    return key.partition("[")[0] in typed


def _leaf_keys(value: object, key: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaf_keys(inner, f"{key}.{name}")
    else:
        yield key


def _is_path(hint: Any) -> bool:
    found = typing.get_origin(hint) or hint
    return isinstance(found, type) and (found is os.PathLike or issubclass(found, PurePath))
