"""In which parameters runs differ: the chosen options first, and not every argument that follows from them.

Two runs with ``clip=none`` and ``clip=zscore`` differ in the sixteen arguments of the plugin too, which only one of
them has. A parameter below a part of the config whose option (or class) differs is shown if all runs have it, such as
`optimizer.lr` of two optimizers; if it was typed on a command line; or if runs with the same option differ in it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from stabletrain.tracking.naming import MAX_PARAM, flatten, safe_key, shorten

_CHOICES = "choices."
_TARGET = "._target_"
_TYPED = "typed"
_CHANGED = "changed."
_CODE = ("stabletrain.version", "git.sha", "git.dirty", "data.digest")
"""Tags that say which code and data a run was made with."""
_NOT_PARAMS = ("run_dir", "resume", "logger", "trust")
_NOT_ARGUMENTS = ("._partial_", "._recursive_", "._convert_")
_SEEDS = ("seed", "random_seed", "random_state", "rng_seed", "seed_everything")

Row = tuple[str | None, ...]


def is_seed(name: str) -> bool:
    """Whether a parameter is a seed.

    >>> is_seed("seed"), is_seed("data.seed"), is_seed("data.seed_length")
    (True, True, False)
    """
    return name.rpartition(".")[2] in _SEEDS


def parameters(params: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, str]:
    """Return a run's parameters with those that a resume has changed: the first value, then the last.

    Args:
        params: as they were logged when the run began.
        tags: of the run.

    >>> parameters({"trainer.max_steps": "100"}, {"changed.trainer.max_steps": "200"})
    {'trainer.max_steps': '100, then 200'}
    """
    changed = {name.removeprefix(_CHANGED): value for name, value in tags.items() if name.startswith(_CHANGED)}
    return {
        name: f"{value}, then {changed[name]}" if name in changed and name != _TYPED else value
        for name, value in params.items()
    }


def params_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters that a run with this config logs, for one that is in no store.

    Args:
        config: the content of run.yaml.

    >>> params_of({"seed": 1, "run_dir": "runs/a", "optimizer": {"_partial_": True, "lr": 0.1}})
    {'seed': '1', 'optimizer.lr': '0.1'}
    """
    kept = {key: value for key, value in config.items() if key not in _NOT_PARAMS}
    return {
        safe_key(key): shorten(value, MAX_PARAM) for key, value in flatten(kept) if not key.endswith(_NOT_ARGUMENTS)
    }


def differences(runs: Sequence[Mapping[str, str]]) -> dict[str, Row]:
    """Return the parameters in which runs differ: name -> value of each run, None if it has none.

    Args:
        runs: parameters of each run.

    >>> clip = {"choices.plugins/clip": "norm", "plugins.clip._target_": "ClipNorm", "plugins.clip.max_norm": "1.0"}
    >>> none = {"choices.plugins/clip": "none", "plugins.clip": "None"}
    >>> differences([clip | {"seed": "0"}, none | {"seed": "1"}])
    {'clip': ('norm', 'none'), 'seed': ('0', '1')}
    """
    options = _options(runs)
    answers = {label: row for label, row in options.values() if len(set(row)) > 1}
    nodes = {node: row for node, (label, row) in options.items() if label in answers}
    labels = dict(options.values())
    typed = {name for run in runs for name in _typed(run)}
    others = {}
    for name in sorted({name for run in runs for name in run}):
        row = tuple(run.get(name) for run in runs)
        if len(set(row)) == 1 or name == _TYPED or name.startswith(_CHOICES) or name in nodes:
            continue
        if name in labels or (name.endswith(_TARGET) and name.removesuffix(_TARGET) in nodes):
            continue
        if name not in typed and _follows(name, row, nodes):
            continue
        others[name] = row
    return {
        **{label: answers[label] for label in sorted(answers)},
        **{name: row for name, row in others.items() if is_seed(name)},
        **{name: row for name, row in others.items() if name in typed and not is_seed(name)},
        **{name: row for name, row in others.items() if name not in typed and not is_seed(name)},
    }


def code_differences(tags: Sequence[Mapping[str, str]]) -> dict[str, Row]:
    """Return in which versions of code and data runs differ; a value that a run has not recorded is None.

    Args:
        tags: of each run.

    >>> code_differences([{"git.sha": "0123456789ab", "git.dirty": "true"}, {"git.sha": "0123456789ab"}])
    {'git.dirty': ('true', None)}
    """
    rows = {name: tuple(each.get(name) for each in tags) for name in _CODE}
    rows["git.sha"] = tuple(value and value[:8] for value in rows["git.sha"])
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def _options(runs: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, Row]]:
    """Place in the config -> name and value of the option there: the chosen one, else the class."""
    chosen = sorted({name for run in runs for name in run if name.startswith(_CHOICES)})
    groups = {name.removeprefix(_CHOICES) for name in chosen}
    found: dict[str, tuple[str, Row]] = {}
    for name in chosen:
        group = name.removeprefix(_CHOICES)
        short = group.removeprefix("plugins/")
        label = group if short != group and short in groups else short
        found[group.replace("/", ".")] = label, tuple(run.get(name, run.get(label)) for run in runs)
    for name in sorted({name for run in runs for name in run if name.endswith(_TARGET)}):
        node = name.removesuffix(_TARGET)
        classes = tuple((run.get(name) or run.get(node) or "").rpartition(".")[2] or None for run in runs)
        if node not in found or (len(set(found[node][1])) == 1 and len(set(classes)) > 1):
            found[node] = node, classes
    return found


def _follows(name: str, row: Row, nodes: Mapping[str, Row]) -> bool:
    """Whether a parameter is one of an option's own, which differs because the option does."""
    above = [answers for node, answers in nodes.items() if name.startswith(f"{node}.")]
    if not above or None not in row:
        return False
    values: dict[tuple[str | None, ...], str | None] = {}
    return all(
        values.setdefault(answers, value) == value for answers, value in zip(zip(*above, strict=True), row, strict=True)
    )


def _typed(run: Mapping[str, str]) -> list[str]:
    """The keys that were typed on the run's command line."""
    try:
        found = ast.literal_eval(run.get(_TYPED, "[]"))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [str(each) for each in found] if isinstance(found, list) else []
