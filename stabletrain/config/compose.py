"""From a recipe's name and overrides to one plain config, by Hydra's Compose API, with every mistake in plain words."""

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
from stabletrain.config.problems import ConfigError, Problem, suggestion
from stabletrain.paths import data_dir

# Groups that hold one thing to build, or nothing: what `none` leaves behind is null in run.yaml.
BUILT = ("model", "data", "optimizer", "schedule", "logger", "chaos")


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A composed config.

    Args:
        recipe: the recipe's name.
        config: the resolved config, plain mappings, lists and values.
        choices: config group -> chosen option.
        overrides: what was typed.
        problems: the mistakes found on the way; the config lacks the overrides that they are about.
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
        ConfigError: if there is none.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser().absolute()
        if path.is_file():
            return path
        raise ConfigError([Problem("recipe", f"there is no file {path}; `stabletrain cp` copies a recipe to edit")])
    known = discovery.recipes()
    if name not in known:
        raise ConfigError([Problem("recipe", f"there is no recipe {name!r}{suggestion(name, known)}")])
    return known[name].file


def compose(recipe: str, overrides: Sequence[str] = ()) -> Composed:
    """Compose one job's config.

    A plain override ``a.b=1`` may set any key, also one that no YAML file lists: whether the key exists is decided by
    the signature it ends up in (`stabletrain.config.validate`), which knows more names than the files do.

    Args:
        recipe: a recipe's name, or the path of a YAML file.
        overrides: Hydra overrides.

    Raises:
        ConfigError: if nothing can be composed at all.
    """
    file = find_recipe(recipe)
    groups = discovery.groups(extra=[file.parent] if file.parent != data_dir("recipes") else [])
    in_defaults = _groups_in_defaults(file)
    problems: list[Problem] = []
    wanted: list[Override] = []
    for override in _parse(overrides):
        found = _group_problem(override, groups)
        if found is not None:
            problems.append(found)
        else:
            wanted.append(override)
    bad_groups = tuple(problem.key.replace("/", ".") + "." for problem in problems)
    wanted = [override for override in wanted if not override.key_or_group.startswith(bad_groups)]
    with _hydra(file):
        config = _compose(file, [_adapted(override, groups, in_defaults) for override in wanted], groups)
        name = recipe if recipe in discovery.recipes() else file.stem
        return _finished(name, config, overrides, problems, emptied=_emptied(wanted, groups))


def expand(recipe: str | None, arguments: Sequence[str], *, multirun: bool) -> list[tuple[str, list[str]]]:
    """Return the jobs that a command line asks for: pairs of a recipe and its overrides.

    ``recipe=a,b`` and every other sweep of Hydra's override grammar (``a=1,2``, ``range(1,4)``, ``choice(...)``,
    ``glob(*)``) are multiplied out when ``multirun`` is set.

    Args:
        recipe: the recipe, if it was given by position.
        arguments: Hydra overrides.
        multirun: whether several jobs are meant.

    Raises:
        ConfigError: if an override cannot be read, sweeps without ``multirun``, or no recipe is named.
    """
    axes: list[list[str]] = []
    recipes = [recipe] if recipe else []
    with _hydra(data_dir("conf") / "train.yaml") as loader:
        for override in _parse(arguments, loader):
            values = [override.input_line or ""]
            if override.is_sweep_override():
                if not multirun:
                    raise ConfigError([Problem(override.input_line or "", "several values make several runs; add -m")])
                if not override.is_discrete_sweep():
                    raise ConfigError(
                        [Problem(override.input_line or "", "an interval has no list of values; name them")]
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
    """Initialise Hydra on a primary config's folder, and leave no trace of it in the process."""
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
    """Say what is wrong with the choice of an option, if this override is one."""
    key = override.key_or_group
    if override.is_sweep_override():
        return Problem(override.input_line or key, "several values make several runs; add -m")
    if key not in groups:
        if "/" in key:
            return Problem(key, f"there is no config group {key!r}{suggestion(key, groups)}")
        return None
    value = override.value()
    if override.type is OverrideType.DEL or isinstance(value, list):
        return None
    options = groups[key]
    if value is None:
        return Problem(key, f"null is no option; use {key}=none")
    if not isinstance(value, str | int | float | bool) or str(override.get_value_element_as_str()) not in options:
        typed = str(override.get_value_element_as_str())
        return Problem(key, f"there is no option {typed!r}{suggestion(typed, options)}")
    return None


def _adapted(override: Override, groups: Mapping[str, object], in_defaults: set[str]) -> str:
    """Write an override as Hydra wants it: ``+`` for a group the defaults lack, ``++`` for any value."""
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
            raise ConfigError(
                [Problem(str(source), f"this is not valid YAML: {' '.join(str(error).split())}")]
            ) from None
        for entry in content.get("defaults", []) if isinstance(content, dict) else []:
            if isinstance(entry, dict):
                found |= {str(key).split()[-1].lstrip("/") for key in entry}
    return found


def _compose(file: Path, overrides: list[str], groups: Mapping[str, Mapping[str, Any]]) -> DictConfig:
    location = data_dir("conf").as_uri().replace("'", "\\'")
    searchpath = f"hydra.searchpath=['{location}']"
    try:
        with warnings.catch_warnings():
            # The none option of each slot is stored for other people's apps, and is a file here.
            warnings.filterwarnings("ignore", message=r"\s*'plugins/\w+/none' is validated against ConfigStore schema")
            # Without `_self_` a recipe's own keys come last, as they should.
            warnings.filterwarnings("ignore", message=r".*Defaults list is missing `_self_`")
            return hydra_compose(file.stem, [*overrides, searchpath], return_hydra_config=True)
    except MissingConfigException as error:
        missing = str(error.missing_cfg_file or "").removesuffix(".yaml").lstrip("/")
        group, _, option = missing.rpartition("/")
        known = groups.get(group, {}) if group else groups
        text = f"there is no {option!r}{suggestion(option, known)}"
        raise ConfigError([Problem(f"{file}: {group or 'defaults'}", text)]) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_translated(error, file)]) from None
    except yaml.YAMLError as error:
        raise ConfigError([Problem(str(file), f"this is not valid YAML: {' '.join(str(error).split())}")]) from None


def _translated(error: Exception, file: Path) -> Problem:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    text = lines[0] if lines else type(error).__name__
    if text.startswith("You must specify"):
        group = text.split("'")[1]
        return Problem(group, f"the recipe chooses no {group}; add {group}=OPTION")
    return Problem(str(key or file), text)


def _emptied(overrides: Sequence[Override], groups: Mapping[str, object]) -> list[str]:
    """Return the groups that the command line empties: what a recipe says of their arguments goes with them."""
    none = [
        override.key_or_group
        for override in overrides
        if override.key_or_group in groups and (override.type is OverrideType.DEL or override.value() == "none")
    ]
    keys = [override.key_or_group for override in overrides]
    return [group for group in none if not any(key.startswith(group.replace("/", ".") + ".") for key in keys)]


def _finished(
    name: str, composed: DictConfig, overrides: Sequence[str], problems: list[Problem], *, emptied: Sequence[str]
) -> Composed:
    chosen = OmegaConf.to_container(composed.hydra.runtime.choices)
    assert isinstance(chosen, dict)
    choices = {str(group): str(option) for group, option in chosen.items() if not str(group).startswith("hydra/")}
    config = OmegaConf.masked_copy(composed, [key for key in map(str, composed) if key != "hydra"])
    OmegaConf.set_struct(config, False)
    config["recipe"] = name
    try:
        problems += [Problem(key, "a value is missing; set it") for key in sorted(OmegaConf.missing_keys(config))]
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError([*problems, _translated(error, Path(name))]) from None
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
