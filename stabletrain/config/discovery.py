"""Find plugins, slots and recipes by their files: fast, and no plugin can make it fail, since none is imported."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError
from stabletrain.paths import data_dir

GROUP = "stabletrain.plugins"
KINDS = ("rule", "transform", "callback", "schedule", "optimizer", "precision", "strategy")
SLOTS = "plugins"
BUILT = ("model", "data", "optimizer", "schedule", "logger", "chaos")
"""Groups whose option is one object to build; their option `none` becomes null in run.yaml."""
_MOST_OPTIONS = 1000


class DiscoveryError(UserError):
    """Two installed plugins have the same name or option; the message names both."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice of a config group: ``group=name`` on the command line.

    Args:
        group: config group, such as ``plugins/clip``.
        name: such as ``zscore``.
        file: its YAML file.
    """

    group: str
    name: str
    file: Path

    @property
    def summary(self) -> str:
        """The file's first comment line, or an empty string."""
        return first_comment(self.file)


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """One plugin: a folder with a ``conf/``.

    Args:
        name: the folder's name.
        package: dotted name of the Python package that is the folder.
        folder: path of the folder.
        distribution: name of the installed distribution that contains it.
        kind: the name of its code file (``rule``, ``transform``, ...), or ``other``.
        options: the options in its ``conf/``.
    """

    name: str
    package: str
    folder: Path
    distribution: str
    kind: str
    options: tuple[Option, ...]

    @property
    def card(self) -> Path | None:
        """Path of the plugin's README.md; None if it has none."""
        path = self.folder / "README.md"
        return path if path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A config group below ``plugins/``: at most one of its options is in a run.

    Args:
        name: such as ``clip``.
        question: the first comment line of its none.yaml, which the options answer.
        options: ``none`` first.
    """

    name: str
    question: str
    options: tuple[Option, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named config of a complete run.

    Args:
        name: the argument of ``stabletrain train``.
        file: the primary config.
    """

    name: str
    file: Path

    @property
    def summary(self) -> str:
        """The file's first comment line, or an empty string."""
        return first_comment(self.file)


def plugins() -> dict[str, PluginInfo]:
    """Return all installed plugins by name, in alphabetical order.

    Raises:
        DiscoveryError: if two plugins have the same name, or two files the same option.
    """
    found: dict[str, PluginInfo] = {}
    files = {(option.group, option.name): option.file for option in options_in(data_dir("conf"))}
    for plugin in _all_plugins():
        if plugin.name in found:
            raise DiscoveryError(
                f"plugin name clash: {plugin.name!r} is both {found[plugin.name].folder} "
                f"({found[plugin.name].distribution}) and {plugin.folder} ({plugin.distribution}); "
                f"rename one folder, or uninstall one distribution"
            )
        for option in plugin.options:
            other = files.setdefault((option.group, option.name), option.file)
            if other != option.file:
                raise DiscoveryError(
                    f"config clash: {option.group}={option.name} is both {other} and {option.file}; "
                    f"rename one file, or uninstall one distribution"
                )
        found[plugin.name] = plugin
    return dict(sorted(found.items()))


def slots() -> dict[str, Slot]:
    """Return all slots by name: those of conf/, and those that plugins add."""
    return {
        group.removeprefix(f"{SLOTS}/"): Slot(
            name=group.removeprefix(f"{SLOTS}/"),
            question=options["none"].summary if "none" in options else "",
            options=tuple(sorted(options.values(), key=lambda option: (option.name != "none", option.name))),
        )
        for group, options in groups().items()
        if group.startswith(f"{SLOTS}/")
    }


def recipes() -> dict[str, Recipe]:
    """Return the recipes that are distributed with stabletrain, by name."""
    files = sorted(data_dir("recipes").glob("*.yaml"))
    return {file.stem: Recipe(name=file.stem, file=file) for file in files}


def groups(extra: Iterable[Option] = ()) -> dict[str, dict[str, Option]]:
    """Return every config group with its options, from conf/, all plugins, and the user's own.

    Args:
        extra: options of the user, which take precedence, as in Hydra's search path.

    Raises:
        DiscoveryError: if two installed files have the same option.
    """
    found: dict[str, dict[str, Option]] = {}
    installed = (option for plugin in plugins().values() for option in plugin.options)
    for option in (*extra, *options_in(data_dir("conf")), *installed):
        found.setdefault(option.group, {}).setdefault(option.name, option)
    return {group: dict(sorted(found[group].items())) for group in sorted(found)}


def default_options() -> dict[str, str]:
    """Return the option of each config group that conf/train.yaml selects, the base of every recipe."""
    from stabletrain.config.yaml_file import read_yaml

    entries = read_yaml(data_dir("conf") / "train.yaml")["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def searchpath(folder: Path) -> str:
    """Return a folder as an entry of Hydra's search path, which does not decode ``%20`` in a URI.

    Args:
        folder: absolute.
    """
    return f"file://{folder}"


def plugin_conf_dirs() -> list[Path]:
    """Return the ``conf/`` folder of every plugin, for Hydra's search path."""
    return [plugin.folder / "conf" for plugin in plugins().values()]


def owner_packages() -> frozenset[str]:
    """Return the top-level Python packages that have an entry point of the group ``stabletrain.plugins``."""
    return frozenset(point.value.split(":")[0].split(".")[0] for point in _points())


def options_in(folder: Path) -> Iterator[Option]:
    """Yield the options in the subfolders of a config folder; files directly in it are primary configs.

    Args:
        folder: a folder such as ``conf/``.
    """
    for file in sorted(folder.glob("*/**/*.yaml")):
        relative = file.relative_to(folder)
        yield Option(group=relative.parent.as_posix(), name=file.stem, file=file)


def options_of(folder: Path, groups: Iterable[str]) -> list[Option]:
    """Return the options of the user's own, which lie in a folder that may be a home folder with anything else in it.

    Args:
        folder: the folder of a recipe.
        groups: config groups that are looked for; so are all folders directly in it.

    Returns:
        The first `_MOST_OPTIONS`.
    """
    with os.scandir(folder) as entries:
        names = {entry.name for entry in itertools.islice(entries, _MOST_OPTIONS) if entry.is_dir()}
    found: list[Option] = []
    for group in sorted(names.union(groups)):
        files = itertools.islice((folder / group).glob("*.yaml"), _MOST_OPTIONS)
        found += [Option(group=group, name=file.stem, file=file) for file in sorted(files)]
    return found[:_MOST_OPTIONS]


def content(option: Option) -> dict[str, Any]:
    """Return the content of an option's file, merged with the options of its own group in its defaults list.

    Args:
        option: an option without interpolations into other groups.

    Raises:
        UserError: if the file is no YAML, or its defaults list is not one of options of its group.
    """
    return _content(option, ())


def _content(option: Option, above: tuple[str, ...]) -> dict[str, Any]:
    from stabletrain.config.yaml_file import read_yaml

    own = read_yaml(option.file)
    names = own.pop("defaults", [])
    options = groups().get(option.group, {})
    merged: dict[str, Any] = {}
    for name in names if isinstance(names, list) else [names]:
        if name == "_self_":
            continue
        if not isinstance(name, str) or name not in options or name in (*above, option.name):
            raise DiscoveryError(
                f"{option.file}: defaults: expected other options of {option.group}, got {name!r}; correct the file"
            )
        merged |= _content(options[name], (*above, option.name))
    return merged | own


def first_comment(file: Path) -> str:
    """Return the first line of the comment at the top of a YAML file; an empty string if there is none.

    Args:
        file: a YAML file.
    """
    if not file.is_file():  # a named pipe has no end
        return ""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            text = line.strip()
            if text.startswith("#") and not text.startswith("# @package"):
                return text.lstrip("# ").strip()
            if text and not text.startswith("#"):
                return ""
    return ""


def clear_cache() -> None:
    """Search again at the next call; needed after a distribution was installed or removed."""
    _points.cache_clear()
    _all_plugins.cache_clear()


@cache
def _points() -> tuple[EntryPoint, ...]:
    return tuple(sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)))


@cache
def _all_plugins() -> tuple[PluginInfo, ...]:
    return tuple(plugin for point in _points() for plugin in _plugins_of(point))


def _plugins_of(point: EntryPoint) -> Iterator[PluginInfo]:
    package = point.value.split(":")[0]
    distribution = point.dist.name if point.dist is not None else package.split(".")[0]
    try:
        spec = importlib.util.find_spec(package)
    except ImportError:
        spec = None
    if spec is None:
        raise DiscoveryError(
            f"distribution {distribution!r} declares the plugin package {package!r} (entry point {point.name!r} of "
            f"group {GROUP!r}), but there is no such package; reinstall or uninstall the distribution"
        )
    for location in spec.submodule_search_locations or []:
        home = Path(location)
        for folder in (home, *sorted(home.iterdir())):
            if (folder / "conf").is_dir():
                yield PluginInfo(
                    name=folder.name,
                    package=package if folder == home else f"{package}.{folder.name}",
                    folder=folder,
                    distribution=distribution,
                    kind=next((kind for kind in KINDS if (folder / f"{kind}.py").is_file()), "other"),
                    options=tuple(options_in(folder / "conf")),
                )
