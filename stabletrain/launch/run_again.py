"""From a recorded run.yaml to a job of the launcher: what names the old run is made fresh, and nothing is trusted."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from stabletrain.config.compose import Composed
from stabletrain.config.overrides import parse
from stabletrain.config.problems import ConfigError, suggestion
from stabletrain.config.validate import check_keys
from stabletrain.errors import UserError
from stabletrain.launch.bounded import is_count, read_json
from stabletrain.launch.launcher import Job
from stabletrain.launch.mlflow_run import MLFLOW_LOGGER, is_tracked
from stabletrain.runtime.records.run_files import RUN_YAML, RUN_YAML_RECORD

END = "reproduce_end"
REPEAT = "reproduce_record"
"""Names in ``callbacks`` of what is added to a repeat."""
END_TARGET = "stabletrain.runtime.checkpoints.end_after.EndAfter"
REPEAT_TARGET = "stabletrain.runtime.records.record_repeat.RecordRepeat"
REPEAT_FILE = "environment/repeat.json"
NO_LOGGER = {"_target_": "lightning.pytorch.loggers.logger.DummyLogger"}
"""Logs nothing, as in ``fast_dev_run``; callbacks and modules that need a logger have one."""

_NEEDED = ("model", "data", "trainer", "launch", "seed", "recipe")
_DEFAULTS: Mapping[str, Any] = {
    "optimizer": None, "schedule": None, "plugins": {}, "guard": None, "callbacks": {}, "chaos": None,
    "precision": None, "strategy": None, "runtime": None,
}  # fmt: skip
"""Keys that a run.yaml of an earlier version may lack."""
_FOLLOW = (("trainer.devices", "launch.processes"), ("trainer.num_nodes", "launch.nodes"))


def same_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the part of a run.yaml that decides what a run computes.

    Args:
        config: its content, from anybody.
        name: of the run, for messages.

    Raises:
        UserError: if it is no run.yaml.
    """
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise UserError(
            f"reproduce: the {RUN_YAML} of {name} lacks {', '.join(missing)}; expected that of a run of "
            "stabletrain train"
        )
    recipe = config["recipe"]
    if not isinstance(recipe, str) or not recipe.isprintable() or recipe.startswith(".") or {"/", "\\"} & set(recipe):
        raise UserError(f"reproduce: the {RUN_YAML} of {name}: recipe: expected a plain name, got {recipe!r:.100}")
    found = {key: copy.deepcopy(value) for key, value in config.items() if key not in RUN_YAML_RECORD}
    found = {
        **copy.deepcopy(dict(_DEFAULTS)),
        **found,
        "run_dir": None,
        "resume": None,
        "dry_run": False,
        "memory": None,
    }
    found["callbacks"] = {} if found["callbacks"] is None else found["callbacks"]
    if isinstance(found["callbacks"], dict):
        for key, target in ((END, END_TARGET), (REPEAT, REPEAT_TARGET)):
            node = found["callbacks"].get(key)
            if isinstance(node, dict) and node.get("_target_") == target:  # of a run that is a repeat itself
                del found["callbacks"][key]
    return found


def own_end(config: Mapping[str, Any]) -> int | None:
    """Return the steps after which a run was ended that is a repeat itself; None for any other run.

    Args:
        config: the content of its run.yaml, from anybody.
    """
    callbacks = config.get("callbacks")
    node = callbacks.get(END) if isinstance(callbacks, Mapping) else None
    steps = node.get("steps") if isinstance(node, Mapping) and node.get("_target_") == END_TARGET else None
    return steps if is_count(steps) and steps > 0 else None


def fresh_logger(config: Mapping[str, Any], experiment: str, *, tracked: bool) -> dict[str, Any] | None:
    """Return the logger of a repeat: without an address, an id or a folder of the old run.

    Args:
        config: from `same_config`.
        experiment: of the old run; empty: unknown.
        tracked: whether the repeat is logged.
    """
    node = config.get("logger")
    if not isinstance(node, Mapping):
        return None
    if not tracked:
        return dict(NO_LOGGER)
    if not is_tracked(config):
        return dict(node)
    kept = {key: value for key, value in node.items() if key not in ("tracking_uri", "run_id", "save_dir")}
    named = kept.get("experiment") or experiment or None
    return {**kept, "_target_": MLFLOW_LOGGER, "tracking_uri": None, "run_id": None, "experiment": named}


def changed(config: dict[str, Any], words: Sequence[str]) -> None:
    """Set values of a config.

    Args:
        config: from `same_config`; it is changed.
        words: ``KEY=VALUE``, as typed.

    Raises:
        UserError: if a word is none, or there is no such key.
    """
    for override in parse(words):
        key = override.key_or_group
        if override.is_delete() or override.is_sweep_override() or "/" in key or key in ("run_dir", "resume", "logger"):
            raise UserError(
                f"reproduce: expected KEY=VALUE, such as launch.threads=1, got {override.input_line!r}; other options "
                "and sweeps are of stabletrain train"
            )
        for follower, leader in _FOLLOW:
            if key == leader:
                _set(config, follower, override.value())
        _set(config, key, override.value())


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    node: Any = config
    for index, name in enumerate(above):
        if not isinstance(node, dict) or not isinstance(node.get(name), dict):
            where = ".".join(above[: index + 1])
            known = [each for each in node if isinstance(node[each], dict)] if isinstance(node, dict) else []
            raise UserError(f"reproduce: {key}: the run has no {where}{suggestion(name, known)}")
        node = node[name]
    node[last] = value


def job_of(
    config: dict[str, Any],
    choices: object,
    changes: Sequence[str],
    *,
    tags: Mapping[str, str],
    command: Sequence[str],
    resume: str | None,
) -> Job:
    """Return the job that runs a config again.

    Args:
        config: complete, but for ``run_dir`` and ``resume``.
        choices: config group -> chosen option, from run.yaml.
        changes: what the command line has changed; their keys may name any path.
        tags: of the new run.
        command: the command line.
        resume: checkpoint of this machine from which it starts; None: from new weights.

    Raises:
        ConfigError: with every mistake that the config itself shows.
    """
    chosen = choices if isinstance(choices, Mapping) else {}
    composed = Composed(
        recipe=config["recipe"],
        config={**config, "resume": resume},
        choices={str(group): option for group, option in chosen.items() if isinstance(option, str)},
        overrides=tuple(changes),
        problems=(),
    )
    problems = check_keys(composed)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return Job(recipe=composed.recipe, composed=composed, number=None, name=None, tags=tags, command=command)


def add_end(config: dict[str, Any], steps: int | None, *, save: bool) -> None:
    """Let a run end after a number of attempted steps; ``max_steps`` stays.

    Args:
        config: from `same_config`; it is changed.
        steps: over the whole run; None: at the run's own end.
        save: whether to save a checkpoint at that step.
    """
    if steps is not None:
        config["callbacks"][END] = {"_target_": END_TARGET, "steps": steps, "save": save}


def add_record(config: dict[str, Any]) -> None:
    """Let a run record what `repeat_record` returns.

    Args:
        config: from `same_config`; it is changed.
    """
    config["callbacks"][REPEAT] = {"_target_": REPEAT_TARGET, "file": REPEAT_FILE}


def repeat_record(folder: Path) -> tuple[list[str] | None, list[str]]:
    """Return the modules that a repeat has imported, and the operators that torch called non-deterministic in it.

    Args:
        folder: the run's.

    Returns:
        None and an empty list, if it has recorded nothing.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = read_json(folder / REPEAT_FILE)
        return content["modules"], content["undetermined"]
    return None, []
