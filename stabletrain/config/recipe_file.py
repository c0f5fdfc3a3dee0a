"""What a recipe file may contain: values and references inside the config, but nothing that reads from outside of it.

This also applies to the config files beside a recipe. Files of stabletrain and of installed plugins are not checked:
whoever installed them has run their code. Nor is the command line, which the user has typed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stabletrain.config.problems import ConfigError, Problem

MOST_CONFIGS = 1000
"""Config files that the defaults lists of one recipe may select, counted as often as they are selected."""

_REFERENCE = re.compile(r"\$\{\s*\.*[\w-]+(?:\.[\w-]+|\[[\w-]+\])*\s*\}")
_PACKAGE = re.compile(r"_global_|_group_|_here_|(?:_global_\.|_group_\.)?[\w-]+(?:\.[\w-]+)*")
_DEFAULTS = "expected a list of names and of `group: option`, such as [train, {override model: char_gpt}, _self_]"


def check_content(content: Mapping[str, Any], file: Path) -> None:
    """Refuse what a file that anybody may have written must not contain.

    Args:
        content: of the file.
        file: named in the message.

    Raises:
        ConfigError: if an interpolation is not just a reference to another key, or ``hydra`` is configured.
    """
    found = [Problem(f"{file}: {key}", text) for key, text in _interpolations(content, "")]
    if "hydra" in content:
        found.append(Problem(f"{file}: hydra", "a recipe does not configure Hydra; remove the key"))
    if found:
        raise ConfigError(found)


def _interpolations(node: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            if "${" in name:
                yield key or name, f"expected a plain key, got {name!r}; write its name"
            yield from _interpolations(value, f"{key}.{name}" if key else name)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _interpolations(value, f"{key}[{index}]")
    elif isinstance(node, str) and "${" in node and ("\\" in node or "${" in _REFERENCE.sub("", node)):
        yield (
            key,
            f"expected a value, or a reference to another key such as ${{seed}}, got {node!r:.200}; a file may not "
            "read environment variables or call resolvers: write the value, or give it on the command line",
        )


def check_header(text: str, file: Path) -> None:
    """Refuse comments ``# @package X`` that Hydra cannot read, or with which a file would configure Hydra.

    Args:
        text: of the file.
        file: named in the message.

    Raises:
        ConfigError: if a line ``# @`` before the first key is no ``# @package NAME``.
    """
    for number, line in enumerate(text[:512].splitlines(), start=1):
        words = line.strip().lstrip("#").split()
        if line.strip() and not re.match(r"\s*#\s*@", line):
            return
        if words and (len(words) != 2 or words[0] != "@package" or not _allowed_package(words[1])):
            raise ConfigError(
                [Problem(f"{file}, line {number}", f"expected a comment such as '# @package _global_', got {line!r}")]
            )


def _allowed_package(package: str) -> bool:
    parts = package.removeprefix("_global_").removeprefix("_group_").lstrip(".").split(".")
    return bool(_PACKAGE.fullmatch(package)) and parts[0] != "hydra"


def selected(content: Mapping[str, Any], group: str, file: Path) -> list[str]:
    """Return the configs that the defaults list of a file selects, as ``group/option``.

    Args:
        content: of the file.
        group: the config group that contains it; empty for a recipe.
        file: named in the message.

    Returns:
        Without those that ``override`` another entry, and those that depend on other choices.

    Raises:
        ConfigError: if the list is not as Hydra expects it, or names a file outside the config folders.
    """
    entries = content.get("defaults", [])
    if not isinstance(entries, list):
        got = "nothing" if entries is None else f"{entries!r:.100} ({type(entries).__name__})"
        raise ConfigError([Problem(f"{file}: defaults", f"{_DEFAULTS}; got {got}")])
    found: list[str] = []
    for index, entry in enumerate(entries):
        key, option = _entry(entry, f"{file}: defaults[{index}]")
        *words, name = key.split()
        name, _, package = name.partition("@")
        options = [option] if isinstance(option, str) else option or []
        _check_names(name, options, package, f"{file}: defaults[{index}]")
        if "override" in words or name == "_self_":
            continue
        base = name[1:] if name.startswith("/") else f"{group}/{name}".lstrip("/")
        chosen = [base] if option is _NO_GROUP else [f"{base}/{each}" for each in options]
        found += [each for each in chosen if "${" not in each and not each.endswith("???")]
    return found


def groups_in_defaults(content: Mapping[str, Any]) -> set[str]:
    """Return the config groups that a recipe's defaults list names.

    Args:
        content: of the recipe; its list may have mistakes.
    """
    entries = content.get("defaults")
    mappings = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {key.split()[-1].lstrip("/") for entry in mappings for key in entry if key.strip()}


_NO_GROUP: list[str] = []


def _entry(entry: object, where: str) -> tuple[str, str | list[str] | None]:
    """Return the name, and the option or options, of an entry of a defaults list."""
    if isinstance(entry, str) and entry.strip():
        return entry, _NO_GROUP
    if isinstance(entry, dict) and len(entry) == 1:
        ((key, option),) = entry.items()
        options = option if isinstance(option, list) else [option]
        texts = all(isinstance(each, str) and each for each in options) or option is None
        if texts and key.strip() and all(word in ("optional", "override") for word in key.split()[:-1]):
            return key, option
    raise ConfigError([Problem(where, f"{_DEFAULTS}; got {entry!r:.100}")])


def _check_names(name: str, options: list[str], package: str, where: str) -> None:
    for path in (name.removeprefix("/"), *options):
        if any(not part or part.startswith((".", "~")) for part in path.split("/")) or "\\" in path or "://" in path:
            raise ConfigError(
                [Problem(where, f"expected the name of a config in a config folder, got {path!r}; write its name only")]
            )
    if name.lstrip("/").partition("/")[0] == "hydra" or (package and not _allowed_package(package.split(":")[-1])):
        raise ConfigError([Problem(where, f"a recipe does not configure Hydra, got {name!r}; remove the entry")])


class Selections:
    """Which config selects which, to find circles and explosions before Hydra follows them.

    Args:
        primary: the name of the recipe among the configs.
    """

    def __init__(self, primary: str) -> None:
        self._primary = primary
        self._selected: dict[str, list[str]] = {}
        self._files: dict[str, Path] = {}

    def add(self, name: str, selected: list[str], file: Path) -> None:
        """Add a config.

        Args:
            name: ``group/option``.
            selected: from `selected`.
            file: of the config.

        Raises:
            ConfigError: if it selects itself, directly or through others, or the whole is too large.
        """
        self._selected[name], self._files[name] = selected, file
        counts: dict[str, int] = {}
        open_: list[str] = []

        def count(config: str) -> int:
            if config in open_:
                circle = [*open_[open_.index(config) :], config]
                names = " -> ".join(self._files[each].name for each in circle)
                where = f"{self._files[circle[-2]]}: defaults"
                raise ConfigError([Problem(where, f"the configs select each other: {names}; remove an entry")])
            if config not in counts:
                open_.append(config)
                counts[config] = 1 + sum(count(each) for each in self._selected.get(config, ()))
                open_.pop()
            return counts[config]

        for start in (self._primary, name):
            if count(start) > MOST_CONFIGS:
                raise ConfigError(
                    [Problem(f"{file}: defaults", f"expected at most {MOST_CONFIGS} configs in all, got more")]
                )
