"""The command line's overrides: parse them, check those that select options, and write them for Hydra."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, OverrideParseException

from stabletrain.config.problems import ConfigError, Problem, suggestion
from stabletrain.config.refused_options import why_unknown

_EXPECTED = "expected key=value, group=option or ~key, text with special characters in quotes (key='text')"

LONGEST = 10_000
"""Characters of one override."""
DEEPEST = 16
"""Nested brackets in one override; Hydra's parser needs seconds for some dozens."""

NODES = ("plugins", "callbacks", "guard", "param_groups", "runtime")
"""Keys besides config groups that hold mappings."""


def parse(overrides: Sequence[str], loader: Any = None) -> list[Override]:
    """Return the parsed overrides.

    Args:
        overrides: as typed.
        loader: Hydra's config loader, for ``glob``.

    Raises:
        ConfigError: with every override that cannot be parsed.
    """
    parsed, problems = [], []
    for text in overrides:
        reason = _unparsable(text)
        if reason is None:
            try:
                (override,) = OverridesParser.create(config_loader=loader).parse_overrides([text])
                reason = None if override.key_or_group else "there is no key"
                parsed.append(override)
            except (OverrideParseException, HydraException) as error:
                reason = str(error).strip().splitlines()[0]
            except (ValueError, ArithmeticError, RecursionError, AssertionError) as error:
                reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        if reason is not None:
            problems.append(Problem(text, f"{_EXPECTED} ({reason})"))
    if problems:
        raise ConfigError(problems)
    return parsed


def _unparsable(text: str) -> str | None:
    if len(text) > LONGEST:
        return f"at most {LONGEST} characters, got {len(text)}"
    depth = deepest = 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    return f"at most {DEEPEST} nested brackets, got {deepest}" if deepest > DEEPEST else None


def group_problem(override: Override, groups: Mapping[str, Mapping[str, Any]]) -> Problem | None:
    """Return what is wrong with an override that selects an option or replaces a whole node; None if nothing is.

    Args:
        override: parsed.
        groups: config group -> options.
    """
    key = override.key_or_group
    if override.is_sweep_override():
        return Problem(override.input_line or key, "several values need several runs; add -m")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return Problem(key, "Hydra composes the config only; its own settings have no effect, remove it")
    if key not in groups:
        if "/" in key:
            return Problem(key, f"there is no config group {key!r}{suggestion(key, groups)}")
        return _node_problem(override, groups)
    value = override.value()
    if override.type is OverrideType.DEL:
        return None
    options = groups[key]
    if value is None:
        return Problem(key, f"expected an option, got null; use {key}={_an_option(options)}")
    if isinstance(value, list):
        return Problem(
            key, f"expected one option, got a list{suggestion('', options)}; for several runs use -m {key}=a,b"
        )
    if not isinstance(value, str | int | float | bool) or str(override.get_value_element_as_str()) not in options:
        typed = str(override.get_value_element_as_str())
        return Problem(key, f"there is no option {typed!r}{why_unknown(key, typed, options)}")
    return None


def _choices(group: str, options: Collection[str]) -> str:
    return f"{group}=none, or another of {', '.join(options)}" if "none" in options else f"{group}=OPTION"


def _an_option(options: Collection[str]) -> str:
    return "none" if "none" in options else next(iter(options), "OPTION")


def _node_problem(override: Override, groups: Mapping[str, Mapping[str, Any]]) -> Problem | None:
    """What is wrong with a value for a whole node, such as ``plugins.clip=0``, which is no way to select nothing."""
    key = override.key_or_group
    if override.type is OverrideType.DEL:
        text = "plugins are removed one by one: plugins/SLOT=none"
        return Problem(key, text) if key == "plugins" else None
    value = override.value()
    group = key.replace(".", "/")
    if isinstance(value, dict) and value:
        return None
    if group in groups:
        if value is None:
            return None
        advice = f"select an option: {_choices(group, groups[group])}"
        return Problem(key, f"expected _target_ and its arguments, got {value!r:.100}; {advice}")
    if key in NODES or (key.startswith("callbacks.") and key.count(".") == 1):
        if (value is None and key != "plugins") or (key == "callbacks" and value == {}):
            return None
        ways = {
            "plugins": "use plugins/SLOT=OPTION",
            "guard": "set its keys: guard.mode=exact",
            "param_groups": "set its keys: param_groups.decay_embeddings=true",
            "runtime": "set its keys: runtime.sigterm_every=50",
        }
        advice = ways.get(key, "add callbacks.NAME._target_=..., or remove it with ~callbacks.NAME")
        return Problem(key, f"expected keys with values, got {value!r:.100}; {advice}")
    return None


def adapted(override: Override, groups: Mapping[str, object], in_defaults: Collection[str]) -> str:
    """Return an override in Hydra's syntax: ``+`` for a group that is not in the defaults, ``++`` for any value.

    Args:
        override: without problems.
        groups: config group -> options.
        in_defaults: the groups in the defaults lists of the recipe and its base.
    """
    line = override.input_line or ""
    if override.type is OverrideType.DEL or override.package is not None:
        return line
    value = override.get_value_element_as_str()
    if override.key_or_group in groups:
        return f"{'' if override.key_or_group in in_defaults else '+'}{override.key_or_group}={value}"
    return f"++{override.key_or_group}={value}"


def emptied(overrides: Sequence[Override], groups: Mapping[str, object]) -> list[str]:
    """Return the groups that the overrides set to none; the recipe's own arguments for them are dropped, too.

    Args:
        overrides: without problems.
        groups: config group -> options.
    """
    none = [
        override.key_or_group
        for override in overrides
        if override.key_or_group in groups and (override.type is OverrideType.DEL or override.value() == "none")
    ]
    keys = [override.key_or_group for override in overrides]
    return [group for group in none if not any(key.startswith(group.replace("/", ".") + ".") for key in keys)]
