"""Compose a recipe and overrides into one plain config with Hydra's Compose API, and translate Hydra's errors."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stabletrain.config import discovery
from stabletrain.config.discovery import BUILT
from stabletrain.config.problems import ConfigError, Problem, suggestion
from stabletrain.paths import data_dir


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A composed config.

    Args:
        recipe: the recipe's name.
        config: the resolved config, plain mappings, lists and values.
        choices: config group -> chosen option.
        overrides: as typed.
        problems: mistakes found while composing; the config does not contain the overrides with mistakes.
    """

    recipe: str
    config: dict[str, Any]
    choices: dict[str, str]
    overrides: tuple[str, ...]
    problems: tuple[Problem, ...]


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: a recipe's name, or the path of a YAML file.

    Raises:
        ConfigError: if there is no such recipe or file.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser().absolute()
        if path.is_file():
            return path
        raise ConfigError([Problem("recipe", f"there is no file {path}; `stabletrain cp` copies a recipe")])
    known = discovery.recipes()
    if name not in known:
        raise ConfigError([Problem("recipe", f"there is no recipe {name!r}{suggestion(name, known)}")])
    return known[name].file


def compose(recipe: str, overrides: Sequence[str] = ()) -> Composed:
    """Compose one job's config.

    A plain override ``a.b=1`` may set any key, also one that is in no YAML file: `stabletrain.config.validate` checks
    keys against the signatures, which have more arguments than the files list.

    Args:
        recipe: a recipe's name, or the path of a YAML file.
        overrides: Hydra overrides.

    Raises:
        ConfigError: if a mistake makes composing impossible.
    """
    file = find_recipe(recipe)
    groups = discovery.groups(extra=[file.parent] if file.parent != data_dir("recipes") else [])
    in_defaults = _groups_in_defaults(file)
    problems: list[Problem] = []
    valid: list[Override] = []
    for override in _parse(overrides):
        problem = _group_problem(override, groups)
        if problem is not None:
            problems.append(problem)
        else:
            valid.append(override)
    bad_groups = tuple(problem.key.replace("/", ".") + "." for problem in problems)
    valid = [override for override in valid if not override.key_or_group.startswith(bad_groups)]
    with _hydra(file):
        config = _compose(file, [_adapted(override, groups, in_defaults) for override in valid], groups)
        name = recipe if recipe in discovery.recipes() else file.stem
        return _finish(name, config, overrides, problems, emptied=_emptied(valid, groups))


def expand(recipe: str | None, arguments: Sequence[str], *, multirun: bool) -> list[tuple[str, list[str]]]:
    """Return the jobs of a command line: pairs of a recipe and its overrides.

    With ``multirun``, there is one job for each combination of the values in ``recipe=a,b`` and the other sweeps of
    Hydra's override grammar (``a=1,2``, ``range(1,4)``, ``choice(...)``, ``glob(*)``).

    Args:
        recipe: the recipe given by position; None if there was none.
        arguments: Hydra overrides.
        multirun: whether sweeps are allowed.

    Raises:
        ConfigError: if an override cannot be parsed, has several values without ``multirun``, or no recipe is named.
    """
    axes: list[list[str]] = []
    recipes = [recipe] if recipe else []
    with _hydra(data_dir("conf") / "train.yaml") as loader:
        for override in _parse(arguments, loader):
            values = [override.input_line or ""]
            if override.is_sweep_override():
                if not multirun:
                    raise ConfigError([Problem(override.input_line or "", "several values need several runs; add -m")])
                if not override.is_discrete_sweep():
                    raise ConfigError(
                        [Problem(override.input_line or "", "expected a list of values, got an interval")]
                    )
                values = [f"{override.get_key_element()}={text}" for text in override.sweep_string_iterator()]
            if override.key_or_group == "recipe":
                recipes = [value.partition("=")[2].strip("'\"") for value in values]
            else:
                axes.append(values)
    if not recipes:
        raise ConfigError([Problem("recipe", f"none is named{suggestion('', discovery.recipes())}")])
    return [(name, list(job)) for name in recipes for job in itertools.product(*axes)]


@contextmanager
def _hydra(primary: Path) -> Iterator[Any]:
    """Initialise Hydra on a primary config's folder; clear its global state on exit."""
    with initialize_config_dir(str(primary.parent), job_name="stabletrain", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _parse(overrides: Sequence[str], loader: Any = None) -> list[Override]:
    parsed, problems = [], []
    for text in overrides:
        try:
            (override,) = OverridesParser.create(config_loader=loader).parse_overrides([text])
            if not override.key_or_group:
                raise OverrideParseException(text, "there is no key")
            parsed.append(override)
        except (OverrideParseException, HydraException) as error:
            reason = str(error).strip().splitlines()[0]
            problems.append(Problem(text, f"expected key=value, group=option or ~key ({reason})"))
    if problems:
        raise ConfigError(problems)
    return parsed


def _group_problem(override: Override, groups: Mapping[str, Mapping[str, Any]]) -> Problem | None:
    """Return what is wrong with an override that selects an option; None if nothing is, or it selects none."""
    key = override.key_or_group
    if override.is_sweep_override():
        return Problem(override.input_line or key, "several values need several runs; add -m")
    if key not in groups:
        if "/" in key:
            return Problem(key, f"there is no config group {key!r}{suggestion(key, groups)}")
        return None
    value = override.value()
    if override.type is OverrideType.DEL or isinstance(value, list):
        return None
    options = groups[key]
    if value is None:
        return Problem(key, f"expected an option, got null; use {key}=none")
    if not isinstance(value, str | int | float | bool) or str(override.get_value_element_as_str()) not in options:
        typed = str(override.get_value_element_as_str())
        return Problem(key, f"there is no option {typed!r}{suggestion(typed, options)}")
    return None


def _adapted(override: Override, groups: Mapping[str, object], in_defaults: set[str]) -> str:
    """Return an override in Hydra's syntax: ``+`` for a group that is not in the defaults, ``++`` for any value."""
    line = override.input_line or ""
    if override.type is OverrideType.DEL or override.package is not None:
        return line
    value = override.get_value_element_as_str()
    if override.key_or_group in groups:
        return f"{'' if override.key_or_group in in_defaults else '+'}{override.key_or_group}={value}"
    return f"++{override.key_or_group}={value}"


def _groups_in_defaults(file: Path) -> set[str]:
    found = set()
    for source in (data_dir("conf") / "train.yaml", file):
        try:
            content = yaml.safe_load(source.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError([Problem(str(source), f"expected valid YAML: {' '.join(str(error).split())}")]) from None
        for entry in content.get("defaults", []) if isinstance(content, dict) else []:
            if isinstance(entry, dict):
                found |= {str(key).split()[-1].lstrip("/") for key in entry}
    return found


def _compose(file: Path, overrides: list[str], groups: Mapping[str, Mapping[str, Any]]) -> DictConfig:
    location = data_dir("conf").as_uri().replace("'", "\\'")
    searchpath = f"hydra.searchpath=['{location}']"
    try:
        with warnings.catch_warnings():
            # the option `none` of each slot is both a file here and, for other Hydra apps, in the ConfigStore
            warnings.filterwarnings("ignore", message=r"\s*'plugins/\w+/none' is validated against ConfigStore schema")
            # without `_self_`, a recipe's own keys override its defaults, as intended
            warnings.filterwarnings("ignore", message=r".*Defaults list is missing `_self_`")
            return hydra_compose(file.stem, [*overrides, searchpath], return_hydra_config=True)
    except MissingConfigException as error:
        missing = str(error.missing_cfg_file or "").removesuffix(".yaml").lstrip("/")
        group, _, option = missing.rpartition("/")
        known = groups.get(group, {}) if group else groups
        text = f"there is no {option!r}{suggestion(option, known)}"
        raise ConfigError([Problem(f"{file}: {group or 'defaults'}", text)]) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_translate(error, file)]) from None
    except yaml.YAMLError as error:
        raise ConfigError([Problem(str(file), f"expected valid YAML: {' '.join(str(error).split())}")]) from None


def _translate(error: Exception, file: Path) -> Problem:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    text = lines[0] if lines else type(error).__name__
    if text.startswith("You must specify"):
        group = text.split("'")[1]
        return Problem(group, f"the recipe selects no {group}; add {group}=OPTION")
    return Problem(str(key or file), text)


def _emptied(overrides: Sequence[Override], groups: Mapping[str, object]) -> list[str]:
    """Return the groups that the overrides set to none; the recipe's own arguments for them are dropped, too."""
    none = [
        override.key_or_group
        for override in overrides
        if override.key_or_group in groups and (override.type is OverrideType.DEL or override.value() == "none")
    ]
    keys = [override.key_or_group for override in overrides]
    return [group for group in none if not any(key.startswith(group.replace("/", ".") + ".") for key in keys)]


def _finish(
    name: str, composed: DictConfig, overrides: Sequence[str], problems: list[Problem], *, emptied: Sequence[str]
) -> Composed:
    chosen = OmegaConf.to_container(composed.hydra.runtime.choices)
    assert isinstance(chosen, dict)
    choices = {str(group): str(option) for group, option in chosen.items() if not str(group).startswith("hydra/")}
    config = OmegaConf.masked_copy(composed, [key for key in map(str, composed) if key != "hydra"])
    OmegaConf.set_struct(config, False)
    config["recipe"] = name
    try:
        problems += [Problem(key, "this key has no value; set it") for key in sorted(OmegaConf.missing_keys(config))]
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError([*problems, _translate(error, Path(name))]) from None
    assert isinstance(plain, dict)
    result = {str(key): value for key, value in plain.items()}
    for group in emptied:
        parent, _, slot = group.partition("/")
        if slot and isinstance(result.get(parent), dict):
            result[parent][slot] = None
        elif parent in BUILT:
            result[parent] = None
    for key in BUILT:
        result[key] = result.get(key) or None
    for key in ("plugins", "callbacks"):
        nodes = result.get(key) or {}
        result[key] = {slot: node or None for slot, node in nodes.items()} if isinstance(nodes, dict) else nodes
    return Composed(recipe=name, config=result, choices=choices, overrides=tuple(overrides), problems=tuple(problems))
