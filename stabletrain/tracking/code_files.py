"""The code that a run uses, by content: the sha256 of every Python file of the packages that matter.

These are stabletrain, its plugins, the packages that a config names, and the user's own modules that are loaded. Large
libraries are recorded by version. Nothing is imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

OURS = ("stabletrain", "stabletrain_plugins")
BY_VERSION = ("torch", "lightning", "torchmetrics", "bitsandbytes")
"""Packages that are recorded by version, not by content."""

_NO_CODE = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_MOST_FILES = 5_000
_MOST_FOLDERS = 20_000


def named_packages(config: Mapping[str, Any]) -> list[str]:
    """Return the packages whose code a config uses, without those of Python itself, sorted.

    Args:
        config: the content of a run.yaml.

    >>> named_packages({"model": {"_target_": "mine.Net"}, "limit": {"_target_": "datetime.timedelta"}})
    ['lightning', 'mine', 'stabletrain', 'stabletrain_plugins', 'torch']
    """
    named = {target.partition(".")[0] for target in _targets(config)}
    return sorted({*named, *OURS, "torch", "lightning"} - sys.stdlib_module_names - {""})


def code_record(packages: Collection[str], *, loaded: bool = True) -> dict[str, dict[str, Any]]:
    """Return the code of packages: ``{"version": ...}`` or ``{"files": {path: sha256}}`` by package.

    Paths are relative to the package's folder. A package with too many files has the first ones and
    ``"truncated": True``; one that is not found is left out.

    Args:
        packages: their names.
        loaded: whether to add the user's own modules that this process has loaded: those that are not installed.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in packages:
        if name in BY_VERSION:
            with suppress(importlib.metadata.PackageNotFoundError):
                found[name] = {"version": importlib.metadata.version(name)}
        elif paths := package_paths(name):
            found[name] = _package(paths)
    if loaded:
        for name, files in _loaded_files().items():
            if name not in found and name not in BY_VERSION:
                found[name] = {"files": {key: digest for key, path in files.items() if (digest := _sha256(path))}}
    return found


def package_paths(name: str) -> list[Path]:
    """Return the folders of a package, or the file of a module; empty if there is none.

    Args:
        name: of a package or module, without a dot. In the current folder, too, where a worker finds the user's own.
    """
    spec: ModuleSpec | None = None
    with suppress(ImportError, ValueError, AttributeError, OSError):  # ValueError: a module without a spec
        spec = importlib.util.find_spec(name) or PathFinder.find_spec(name, [os.getcwd()])
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(each) for each in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for each in node.values():
            yield from _targets(each)
    elif isinstance(node, list | tuple):
        for each in node:
            yield from _targets(each)


def _package(paths: list[Path]) -> dict[str, Any]:
    files: dict[str, str] = {}
    for root in paths:
        for path in [root] if root.is_file() else _python_files(root):
            if len(files) >= _MOST_FILES:
                return {"files": files, "truncated": True}
            digest = _sha256(path)
            if digest is not None:
                files[path.name if path == root else path.relative_to(root).as_posix()] = digest
    return {"files": files}


def _python_files(root: Path) -> Iterator[Path]:
    """The Python files below a folder; hidden folders, and environments within the folder, are left out."""
    seen = 0
    for folder, folders, names in os.walk(root):  # does not follow links
        seen += 1
        if seen > _MOST_FOLDERS:
            return
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each not in _NO_CODE)
        if "pyvenv.cfg" in names and Path(folder) != root:
            folders[:] = []
            continue
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _loaded_files() -> dict[str, dict[str, Path]]:
    """The files of the loaded modules that are not installed, by package, then by path within it."""
    installed = _installed_folders()
    found: dict[str, dict[str, Path]] = {}
    for name, module in list(sys.modules.items()):
        attributes = getattr(module, "__dict__", {})  # a lazy module would import itself
        file = attributes.get("__file__")
        if not isinstance(file, str) or not file.endswith(".py") or _is_installed(file, installed):
            continue
        if name == "__main__" and (spec := attributes.get("__spec__")) is not None:
            name = str(spec.name)  # python -m package.module
        if name == "__mp_main__" or _is_installed(os.path.realpath(file), installed):
            continue
        top, *inner = name.split(".")
        if os.path.basename(file) != "__init__.py":
            inner = inner[:-1]
        found.setdefault(top, {})["/".join([*inner, os.path.basename(file)])] = Path(file)
    return {name: dict(sorted(files.items())) for name, files in sorted(found.items())}


def _is_installed(file: str, folders: tuple[str, ...]) -> bool:
    return file.startswith(folders) or "site-packages" in file or "dist-packages" in file


def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages(), os.path.dirname(os.__file__)]
    real = [os.path.realpath(each) for each in folders]
    return tuple(os.path.join(each, "") for each in dict.fromkeys([*folders, *real]))


def _sha256(path: Path) -> str | None:
    try:
        if not path.is_file():  # a named pipe would hang whoever opens it
            return None
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
