"""The jobs of a command line: one for each combination of values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hydra.core.override_parser.types import Override, OverrideType, RangeSweep
from hydra.errors import HydraException

from stabletrain.config import discovery
from stabletrain.config.hydra_session import hydra_session
from stabletrain.config.overrides import parse
from stabletrain.config.problems import ConfigError, Problem, suggestion
from stabletrain.paths import data_dir

MOST_JOBS = 1000


def expand(
    recipe: str | None, arguments: Sequence[str], *, multirun: bool, advice: str = "add -m"
) -> list[tuple[str, list[str]]]:
    """Return the jobs of a command line: pairs of a recipe and its overrides, at most `MOST_JOBS`.

    With ``multirun``, there is one job for each combination of the values in ``recipe=a,b`` and the other sweeps of
    Hydra's override grammar (``a=1,2``, ``range(1,4)``, ``choice(...)``, ``glob(*)``).

    Args:
        recipe: the recipe given by position; None if there was none.
        arguments: Hydra overrides.
        multirun: whether sweeps are allowed.
        advice: what to do about several values where they are not.

    Raises:
        ConfigError: if an override cannot be parsed, has several values without ``multirun``, or none with it, there
            are too many jobs, or no recipe is named.
    """
    axes: list[tuple[str, list[str]]] = []
    recipes = [recipe] if recipe else []
    with hydra_session(data_dir("conf") / "train.yaml") as loader:
        for override in parse(arguments, loader):
            line = override.input_line or ""
            values = _values(override, multirun, advice) if override.is_sweep_override() else [line]
            if override.key_or_group == "recipe":
                if override.type is OverrideType.DEL:
                    raise ConfigError([Problem("recipe", f"a run needs one; remove {line}")])
                recipes = [value.partition("=")[2].strip("'\"") for value in values]
            else:
                axes.append((line, values))
    if not any(recipes):
        raise ConfigError([Problem("recipe", f"none is named{suggestion('', discovery.recipes())}")])
    jobs = len(recipes) * math.prod(len(values) for _, values in axes)
    if jobs > MOST_JOBS:
        line = max(axes, key=lambda axis: len(axis[1]))[0] if axes else "recipe"
        raise ConfigError([Problem(line, f"expected at most {MOST_JOBS} runs in all, got {jobs}; sweep in parts")])
    choices = [values for _, values in axes]
    return [(name, list(job)) for name in recipes for job in itertools.product(*choices)]


def _values(override: Override, multirun: bool, advice: str) -> list[str]:
    """Return one override for each value of a sweep."""
    line = override.input_line or ""
    if not multirun:
        raise ConfigError([Problem(line, f"several values need several runs; {advice}")])
    if not override.is_discrete_sweep():
        raise ConfigError([Problem(line, "expected a list of values, got an interval")])
    swept = override.value()
    if isinstance(swept, RangeSweep) and _length(swept) > MOST_JOBS:  # counted first: `shuffle` would make a list of it
        raise ConfigError([Problem(line, f"expected at most {MOST_JOBS} values, got more; sweep in parts")])
    try:
        found = list(itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1))
    except (HydraException, ValueError, ArithmeticError, MemoryError) as error:
        reason = "no number" if isinstance(error, ArithmeticError) else str(error).strip().splitlines()[0]
        raise ConfigError([Problem(line, f"expected values for the runs, got none ({reason})")]) from None
    if not found:
        raise ConfigError([Problem(line, "expected values for the runs, but there are no values in it")])
    if len(found) > MOST_JOBS:
        raise ConfigError([Problem(line, f"expected at most {MOST_JOBS} values, got more; sweep in parts")])
    return [f"{override.get_key_element()}={text}" for text in found]


def _length(swept: RangeSweep) -> float:
    """Return about how many values a range has; 0 if it has none, or is no range."""
    try:
        return (float(swept.stop or 0) - float(swept.start or 0)) / float(swept.step)
    except ArithmeticError:
        return 0.0
