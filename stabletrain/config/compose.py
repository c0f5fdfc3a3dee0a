"""Compose a recipe and overrides into one plain config with Hydra, and translate Hydra's errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stabletrain.config import discovery
from stabletrain.config.discovery import BUILT, Option
from stabletrain.config.hydra_session import BASE, RECIPE, hydra_session, is_installed
from stabletrain.config.origins import keys_of_global_options
from stabletrain.config.outputs import typed_keys
from stabletrain.config.overrides import adapted, emptied, group_problem, parse
from stabletrain.config.problems import ConfigError, Problem, suggestion
from stabletrain.config.recipe_file import groups_in_defaults
from stabletrain.config.refused_options import why_unknown
from stabletrain.config.resolved import missing_keys, resolve_once
from stabletrain.config.sweep import expand
from stabletrain.config.yaml_file import read_yaml
from stabletrain.paths import data_dir

__all__ = ["BUILT", "Composed", "compose", "expand", "find_recipe"]


_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(
        ("run_dir", "resume", "memory", "objective", "guard", "param_groups", "runtime", "precision", "strategy")
    ),
    "dry_run": False,
}
"""Of keys that a recipe without these groups lacks, or that were deleted on the command line."""


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A composed config.

    Args:
        recipe: the recipe's name.
        config: the resolved config, plain mappings, lists and values.
        choices: config group -> chosen option.
        overrides: as typed.
        problems: mistakes found while composing; the config does not contain the overrides with mistakes.
        origins: key -> ``group=option``, for keys that an option of another group has set.
    """

    recipe: str
    config: dict[str, Any]
    choices: dict[str, str]
    overrides: tuple[str, ...]
    problems: tuple[Problem, ...]
    origins: Mapping[str, str] = field(default_factory=dict)


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: a recipe's name, or the path of a YAML file.

    Raises:
        ConfigError: if there is no such recipe or file.
    """
    if name.endswith((".yaml", ".yml")):
        return _own_file(name)
    known = discovery.recipes()
    if name not in known:
        raise ConfigError([Problem("recipe", f"there is no recipe {name!r}{suggestion(name, known)}")])
    return known[name].file


def _own_file(name: str) -> Path:
    try:
        path = Path(name).expanduser().absolute()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # no such home folder, or a null character
        raise ConfigError([Problem("recipe", f"there is no file {name!r} ({error})")]) from None
    if not exists:
        raise ConfigError([Problem("recipe", f"there is no file {path}; `stabletrain cp` copies a recipe")])
    # the name of the file becomes a value of the config, the name of folders and that of an experiment
    if path.stem.startswith(".") or "${" in path.stem or not path.stem.isprintable():
        raise ConfigError([Problem("recipe", f"expected a file with a plain name, got {path.name!r}; rename it")])
    return path


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
    in_defaults = _groups_in_defaults(file)
    own = [] if is_installed(file) else discovery.options_of(file.parent, {*discovery.groups(), *in_defaults})
    groups = discovery.groups(extra=own)
    problems: list[Problem] = []
    valid: list[Override] = []
    for override in parse(overrides):
        problem = group_problem(override, groups)
        if problem is not None:
            problems.append(problem)
        else:
            valid.append(override)
    bad_groups = tuple(problem.key.replace("/", ".") + "." for problem in problems)
    valid = [override for override in valid if not override.key_or_group.startswith(bad_groups)]
    with hydra_session(file):
        config = _compose(file, [adapted(override, groups, in_defaults) for override in valid], groups)
        name = recipe if recipe in discovery.recipes() else file.stem
        return _finish(name, config, overrides, problems, groups, emptied=emptied(valid, groups))


def _groups_in_defaults(file: Path) -> set[str]:
    found: set[str] = set()
    for source in (data_dir("conf") / f"{BASE}.yaml", file):
        found |= groups_in_defaults(read_yaml(source))
    return found


def _compose(file: Path, overrides: list[str], groups: Mapping[str, Mapping[str, Any]]) -> DictConfig:
    location = discovery.searchpath(data_dir("conf")).replace("\\", "\\\\").replace("'", "\\'")
    try:
        with warnings.catch_warnings():
            # the option `none` of each slot is both a file here and, for other Hydra apps, in the ConfigStore
            warnings.filterwarnings("ignore", message=r"\s*'plugins/\w+/none' is validated against ConfigStore schema")
            # without `_self_`, a recipe's own keys override its defaults, as intended
            warnings.filterwarnings("ignore", message=r".*Defaults list is missing `_self_`")
            return hydra_compose(RECIPE, [*overrides, f"hydra.searchpath=['{location}']"], return_hydra_config=True)
    except MissingConfigException as error:
        missing = str(error.missing_cfg_file or "").removesuffix(".yaml").lstrip("/")
        group, _, option = missing.rpartition("/")
        known = groups.get(group, {}) if group else groups
        text = f"there is no {option!r}{why_unknown(group, option, known)}"
        raise ConfigError([Problem(f"{file}: {group or 'defaults'}", text)]) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_translate(error, file)]) from None
    except ConfigError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError, RecursionError) as error:
        # what Hydra raises for configs that it does not expect
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError([Problem(str(file), f"Hydra cannot compose it ({reason}); see its defaults list")]) from None


def _translate(error: Exception, file: Path) -> Problem:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    text = lines[0] if lines else type(error).__name__
    if text.endswith("raised while composing config:"):  # the reason and the key are in the following lines
        text = f"{text.partition(':')[0]}: {lines[1]}" if len(lines) > 1 else text
        key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), key)
    if not key and "Cannot merge DictConfig with ListConfig" in text:
        lists = [name for name, value in read_yaml(file).items() if isinstance(value, list) and name != "defaults"]
        key, text = ", ".join(lists), "expected keys with values, got a list"
    if text.startswith("You must specify"):
        group = text.split("'")[1]
        return Problem(group, f"the recipe selects no {group}; add {group}=OPTION")
    if text.startswith(("Could not delete", "Could not override")):
        wanted = text.split("'")[1].partition("=")[0]
        return Problem(wanted, "there is no such value or entry in the defaults list; correct the name, or remove it")
    if text.startswith("Error merging override"):
        line = text.removeprefix("Error merging override").strip().lstrip("+")
        reason = str(error.__cause__ or "").strip().splitlines() or ["it does not fit"]
        return Problem(line, f"expected another value ({reason[0]})")
    where = f"{file}: {key}" if key else str(file)
    return Problem(where, text.replace(f"'{RECIPE}'", f"'{file.name}'"))


def _finish(
    name: str,
    composed: DictConfig,
    overrides: Sequence[str],
    problems: list[Problem],
    groups: Mapping[str, Mapping[str, Option]],
    *,
    emptied: Iterable[str],
) -> Composed:
    chosen = OmegaConf.to_container(composed.hydra.runtime.choices)
    assert isinstance(chosen, dict)
    choices = {str(group): str(option) for group, option in chosen.items() if not str(group).startswith("hydra/")}
    config = OmegaConf.masked_copy(composed, [key for key in map(str, composed) if key != "hydra"])
    OmegaConf.set_struct(config, False)
    config["recipe"] = name
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    for group in (*emptied, *(key for key in BUILT if raw.get(key) == {})):  # before other keys refer to them
        parent, _, slot = group.partition("/")
        if slot and isinstance(raw.get(parent), dict):
            config[parent][slot] = None
        elif parent in BUILT:
            config[parent] = None
    try:
        result = resolve_once(config)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    problems += [Problem(key, "this key has no value; set it") for key in missing_keys(result)]
    for key in BUILT:
        result[key] = _none_if_empty(result.get(key))
    for key in ("plugins", "callbacks"):
        nodes = {} if result.get(key) is None else result[key]
        result[key] = {slot: _none_if_empty(node) for slot, node in nodes.items()} if isinstance(nodes, dict) else nodes
    for key, default in _DEFAULTS.items():
        result.setdefault(key, default)
    typed = typed_keys(overrides)
    return Composed(
        recipe=name,
        config=result,
        choices=choices,
        overrides=tuple(overrides),
        problems=tuple(problems),
        origins={key: option for key, option in keys_of_global_options(choices, groups) if key not in typed},
    )


def _none_if_empty(node: object) -> object:
    """Return None for the content of an option ``none``; other false values stay, and are mistakes."""
    return None if node == {} else node
