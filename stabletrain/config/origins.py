"""Which option has set a key that is not of its own group: one with ``# @package _global_``, such as ``debug=...``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from stabletrain.config.discovery import Option
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.yaml_file import read_text, read_yaml

_GLOBAL = re.compile(r"^# *@package +_global_ *$", re.MULTILINE)


def keys_of_global_options(
    choices: Mapping[str, str], groups: Mapping[str, Mapping[str, Option]]
) -> Iterator[tuple[str, str]]:
    """Yield the keys that the chosen options set outside of their groups, each with ``group=option``.

    Args:
        choices: config group -> chosen option.
        groups: config group -> its options by name.
    """
    for group, name in choices.items():
        option = groups.get(group, {}).get(name)
        if option is None:
            continue
        try:
            if _GLOBAL.search(read_text(option.file)):
                yield from ((key, f"{group}={name}") for key in _leaves(read_yaml(option.file)))
        except ConfigError:  # composing has read it in its own way, and reports what is wrong with it
            continue


def with_origin(problems: Iterable[Problem], origins: Mapping[str, str]) -> list[Problem]:
    """Return the problems; those of a key that an option of another group has set say so.

    Args:
        problems: of a composed config.
        origins: from `keys_of_global_options`.
    """
    return [
        Problem(each.key, f"{each.text} ({origins[each.key]} sets it)") if each.key in origins else each
        for each in problems
    ]


def _leaves(config: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        if prefix or name != "defaults":
            yield from _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else (f"{prefix}{name}",)
