"""The description of a run in MLflow: what is trained, with which protections, how it ended, and three numbers.

MLflow shows the tag ``mlflow.note.content`` as Markdown at the top of a run's and an experiment's page.
"""

from __future__ import annotations

import getpass
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

NOTE = "mlflow.note.content"
RUNNING = "**The run is in progress.**"
"""Stands where the end will be described."""

EXPERIMENT = (
    "Runs of stabletrain. A run's description says what was trained, which protections it had and how it ended. "
    "`stability/...` are the metrics of the plugins; the artifacts `steps.bin` and `events.jsonl` hold the loss and "
    "the gradient norm of every step, and what the plugins did."
)
"""The description of a new experiment."""

_PROTECTIONS = ("clip", "nonfinite", "outliers", "spike")
_SHOWN = (*_PROTECTIONS, "optimizer", "schedule", "precision", "strategy", "model", "data", "trainer")
"""Options that have a row of their own, or none since the row would say nothing."""
_NOT_OPTIONS = ("logger", "launch")
"""Groups that say where a run is stored and started, not what it computes."""


def options(choices: Mapping[str, str]) -> dict[str, str]:
    """Return the chosen options by the names of their groups, as parameters of a run.

    The slot ``plugins/optimizer`` keeps its whole name where the group ``optimizer`` has the short one.

    Args:
        choices: the key ``choices`` of run.yaml.

    >>> options({"optimizer": "adamw_8bit", "plugins/clip": "zscore", "plugins/optimizer": "swap", "logger": "mlflow"})
    {'optimizer': 'adamw_8bit', 'clip': 'zscore', 'plugins/optimizer': 'swap'}
    """
    named = {key: value for key, value in choices.items() if key not in _NOT_OPTIONS}
    short = {key: key.removeprefix("plugins/") for key in named}
    return {key if key != new and new in named else new: named[key] for key, new in short.items()}


def source_tags(command: Sequence[str] | None = None) -> dict[str, str]:
    """Return the tags with which MLflow shows who has started a run, and by which command.

    Args:
        command: the command line; None: the script of this process, without its arguments.
    """
    tags = {"mlflow.source.type": "LOCAL"}
    if command:
        tags["mlflow.source.name"] = as_typed(command)
    elif sys.argv and sys.argv[0]:
        tags["mlflow.source.name"] = sys.argv[0]
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may have no user of this number
        return tags
    return tags


def note_at_start(config: Mapping[str, Any], command: Sequence[str] = ()) -> str:
    """Return the description of a run that starts.

    Args:
        config: the content of run.yaml.
        command: the command line.

    >>> print(note_at_start({"recipe": "tiny", "seed": 3, "model": {"_target_": "mine.Net"}, "choices": {}}))
    `Net` of the recipe `tiny`, seed 3
    <BLANKLINE>
    | | |
    |---|---|
    | protections | none |
    <BLANKLINE>
    **The run is in progress.**
    """
    chosen = options(config.get("choices") or {})
    parts = [_name(config.get(key)) for key in ("model", "data")]
    trained = " on ".join(_code(part) for part in parts if part)
    head = f"{trained or 'A run'} of the recipe {_code(config.get('recipe'))}, seed {config.get('seed')}"
    optimizer = config.get("optimizer")
    rate = optimizer.get("lr") if isinstance(optimizer, Mapping) else None
    trainer, launch = config.get("trainer") or {}, config.get("launch") or {}
    lengths = [f"{key} {trainer[key]}" for key in ("max_steps", "max_epochs") if trainer.get(key) not in (None, -1)]
    processes = int(launch.get("processes") or 1) * int(launch.get("nodes") or 1)
    others = [f"{key}={chosen[key]}" for key in chosen if key not in _SHOWN and _is_on(chosen[key])]
    rows = {
        "protections": ", ".join(f"{key}={chosen[key]}" for key in _PROTECTIONS if _is_on(chosen.get(key))) or "none",
        "other options": ", ".join(others),
        "optimizer": f"{chosen.get('optimizer', _name(optimizer))}, lr {rate}" if rate is not None else "",
        "schedule": chosen.get("schedule", "") if _is_on(chosen.get("schedule")) else "",
        "precision, strategy": ", ".join(chosen[key] for key in ("precision", "strategy") if key in chosen),
        "length": ", ".join(lengths),
        "processes": str(processes) if processes > 1 else "",
        "command": _code(as_typed(command)) if command else "",
    }
    table = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value]
    return "\n".join([head, "", "| | |", "|---|---|", *table, "", RUNNING])


def note_at_end(note: str, end: str, numbers: Mapping[str, str]) -> str:
    """Return a description with the end of the run; what else somebody has written into it stays.

    Args:
        note: the description so far.
        end: how the run ended, one line.
        numbers: the numbers to show, by what they are.

    >>> print(note_at_end(f"trains\\n\\n{RUNNING}", "finished", {"loss": "2.3"}))
    trains
    <BLANKLINE>
    **finished**
    <BLANKLINE>
    | loss |
    | --- |
    | 2.3 |
    """
    rows = [numbers.keys(), ["---"] * len(numbers), numbers.values()]
    table = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    text = "\n".join([f"**{_cell(end)}**", *(["", *table] if numbers else [])])
    return note.replace(RUNNING, text) if RUNNING in note else f"{note}\n\n{text}".strip()


def note_at_resume(note: str) -> str:
    """Return the description of a run that goes on."""
    return note if RUNNING in note else f"{note}\n\n{RUNNING}".strip()


def as_typed(command: Sequence[str]) -> str:
    """Return a command line as text, without the passwords of addresses.

    >>> as_typed(["stabletrain", "train", "a b", "logger.tracking_uri=https://me:secret@host"])
    "stabletrain train 'a b' logger.tracking_uri=https://host"
    """
    return re.sub(r"://[^/\s@]*@", "://", shlex.join(command))


def number(value: float) -> str:
    """Return a number with four significant digits.

    >>> number(2.34567), number(float("nan"))
    ('2.346', 'nan')
    """
    return f"{value:.4g}"


def _is_on(option: str | None) -> bool:
    return option not in (None, "none")


def _name(node: object) -> str:
    """The class of a node, without its package."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return str(target).rpartition(".")[2] if target else ""


def _code(text: object) -> str:
    """A text as code in Markdown, whatever is in it."""
    return f"`{_cell(str(text)).replace('`', chr(39))}`"


def _cell(text: str) -> str:
    """A text that does not end a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
