"""Finding plugins, slots and recipes by looking at folders: nothing is imported, so nothing can be slow or break."""

from __future__ import annotations

import importlib.util
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


class DiscoveryError(UserError):
    """The installed plugins contradict each other; the message names both sides."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice of a config group: ``group=name`` on the command line.

    Args:
        group: config group, such as ``plugins/clip``.
        name: the choice, such as ``zscore``.
        file: the YAML file behind it.
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
        folder: where it lies.
        distribution: name of the installed distribution that brought it.
        kind: what its code file says it is (``rule``, ``transform``, ...), or ``other``.
        options: what its ``conf/`` offers.
    """

    name: str
    package: str
    folder: Path
    distribution: str
    kind: str
    options: tuple[Option, ...]

    @property
    def card(self) -> Path | None:
        """The plugin's README.md, if it has one."""
        path = self.folder / "README.md"
        return path if path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A question with one answer: a config group below ``plugins/``.

    Args:
        name: the slot, such as ``clip``.
        question: the first comment line of its none.yaml.
        options: the possible answers, ``none`` first.
    """

    name: str
    question: str
    options: tuple[Option, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete named run.

    Args:
        name: what ``stabletrain train`` takes.
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
        DiscoveryError: if two plugins have one name, or two files claim one option.
    """
    found: dict[str, PluginInfo] = {}
    claimed = {(option.group, option.name): option.file for option in options_in(data_dir("conf"))}
    for plugin in _all_plugins():
        if plugin.name in found:
            raise DiscoveryError(
                f"plugin name clash: {plugin.name!r} is both {found[plugin.name].folder} "
                f"({found[plugin.name].distribution}) and {plugin.folder} ({plugin.distribution}); "
                f"rename one folder, or uninstall one distribution"
            )
        for option in plugin.options:
            other = claimed.setdefault((option.group, option.name), option.file)
            if other != option.file:
                raise DiscoveryError(
                    f"config clash: {option.group}={option.name} is both {other} and {option.file}; "
                    f"rename one file, or uninstall one distribution"
                )
        found[plugin.name] = plugin
    return dict(sorted(found.items()))


def slots() -> dict[str, Slot]:
    """Return all slots by name: ours, and those that installed plugins add."""
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
    """Return the recipes that come with the project, by name."""
    files = sorted(data_dir("recipes").glob("*.yaml"))
    return {file.stem: Recipe(name=file.stem, file=file) for file in files}


def groups(extra: Iterable[Path] = ()) -> dict[str, dict[str, Option]]:
    """Return every config group with its options, from conf/, all plugins, and further folders.

    Args:
        extra: folders of the user's own; theirs win, as they do in Hydra's search path.

    Raises:
        DiscoveryError: if two installed files claim one option.
    """
    found: dict[str, dict[str, Option]] = {}
    own = (option for folder in extra for option in options_in(folder))
    installed = (option for plugin in plugins().values() for option in plugin.options)
    for option in (*own, *options_in(data_dir("conf")), *installed):
        found.setdefault(option.group, {}).setdefault(option.name, option)
    return {group: dict(sorted(found[group].items())) for group in sorted(found)}


def plugin_conf_dirs() -> list[Path]:
    """Return the ``conf/`` folder of every plugin, for Hydra's search path."""
    return [plugin.folder / "conf" for plugin in plugins().values()]


def owner_packages() -> frozenset[str]:
    """Return the top-level Python packages that own an entry point of the group ``stabletrain.plugins``."""
    return frozenset(point.value.split(":")[0].split(".")[0] for point in _points())


def options_in(folder: Path) -> Iterator[Option]:
    """Yield the options below a config folder; files directly in it are primary configs and no options.

    Args:
        folder: a folder such as ``conf/``.
    """
    for file in sorted(folder.glob("*/**/*.yaml")):
        relative = file.relative_to(folder)
        yield Option(group=relative.parent.as_posix(), name=file.stem, file=file)


def content(option: Option) -> dict[str, Any]:
    """Return what an option says, with the options of its own group that its defaults list builds on.

    Args:
        option: an option without interpolations into other groups.
    """
    import yaml

    written = yaml.safe_load(option.file.read_text(encoding="utf-8")) or {}
    whole: dict[str, Any] = {}
    for name in written.pop("defaults", []):
        if name != "_self_":
            whole |= content(groups()[option.group][name])
    return whole | written


def first_comment(file: Path) -> str:
    """Return the text of the comment that opens a YAML file, its first line only.

    Args:
        file: a YAML file.
    """
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            text = line.strip()
            if text.startswith("#") and not text.startswith("# @package"):
                return text.lstrip("# ").strip()
            if text and not text.startswith("#"):
                return ""
    return ""


def forget() -> None:
    """Forget what was found, for a process in which something has been installed since."""
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
            f"distribution {distribution!r} announces the plugin package {package!r} (entry point {point.name!r} "
            f"of group {GROUP!r}), but no such package can be found; install it again, or uninstall it"
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
