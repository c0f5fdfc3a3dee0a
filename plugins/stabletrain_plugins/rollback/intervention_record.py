"""What a line of ``interventions.jsonl`` says; every field is checked, since a wrong one would train otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from lightning.pytorch import LightningModule, Trainer

from stabletrain.runtime.records.json_lines import Line
from stabletrain.runtime.records.recipe import recipe_hash
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Identity, Intervention


class Fingerprint(NamedTuple):
    """Identifies the run of a log: only a run with the same fingerprint may replay it.

    Args:
        model: hash of the parameters' names, shapes and dtypes, and of the classes of module and optimizers.
        recipe: hash of the recipe; None outside of a run started from the command line.
        processes: number of processes that train together.
    """

    model: str
    recipe: str | None
    processes: int

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule, parameters: Iterable[tuple[str, Any]]) -> Fingerprint:
        """The fingerprint of a run.

        Args:
            trainer: in a fit.
            module: the module that is trained.
            parameters: names and parameters.
        """
        shapes = [[name, list(p.shape), str(p.dtype)] for name, p in parameters]
        classes = [type(module).__qualname__, *(type(each).__qualname__ for each in trainer.optimizers)]
        model = xxhash.xxh3_64(json.dumps([classes, shapes]).encode()).hexdigest()
        return cls(model, recipe_hash(Path(trainer.default_root_dir)), trainer.world_size)


class Resume(NamedTuple):
    """A restart of the run: lines with later steps describe steps that it discarded.

    Args:
        step: attempted steps in the checkpoint; -1: all lines are discarded.
    """

    step: int


def parse(line: Line) -> Intervention | AcceptedLevel | Resume | None:
    """What a line says; None if it is damaged.

    Args:
        line: of the log.
    """
    if line.record is None:
        return None
    record = dict(line.record)
    try:
        action = record.pop("action")
        step = _integer(record["step"])
        if action == "resume":
            return Resume(step)
        fingerprint_of(line)
        for field in Fingerprint._fields:
            del record[field]
        _require(action in ("accept", "rollback"))
        return _level(record) if action == "accept" else _rollback(record)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def fingerprint_of(line: Line) -> Fingerprint:
    """The fingerprint of the run that wrote a line.

    Args:
        line: of the log; not damaged.
    """
    record = line.record or {}
    return Fingerprint(*(record[field] for field in Fingerprint._fields))


def _rollback(record: dict[str, Any]) -> Intervention:
    before, after = record["applied"]
    made = Intervention(
        **{
            **record,
            "applied": (_integer(before), _integer(after)),
            "excluded": _identities(record["excluded"]),
            "samples": _identities(record["samples"]),
        }
    )
    for value in (made.to, made.incident):
        _require(value is None or _integer(value) >= 0)
    _require((made.to is None) != (made.checkpoint is None))
    _require(made.checkpoint is None or isinstance(made.checkpoint, str))
    _require(_integer(made.rewarm) >= 0 and made.baselines in ("restore", "reset") and isinstance(made.rewound, bool))
    _require(isinstance(made.plugin, str) and isinstance(made.cause, str))
    _require(made.excess is None or isinstance(made.excess, int | float))
    _require(isinstance(made.repeats, bool))
    return made


def _level(record: dict[str, Any]) -> AcceptedLevel:
    signals = {name: tuple(map(float, record[name])) for name in ("losses", "norms")}
    made = AcceptedLevel(**{**record, **signals, "given_back": _identities(record["given_back"])})
    _require(_integer(made.applied) >= 0 and _integer(made.rewarm) >= 0 and isinstance(made.cause, str))
    _require(all(isinstance(value, int | float) for value in (made.level, made.was)))
    return made


def _identities(lists: Sequence[Sequence[Any]]) -> tuple[Identity, ...]:
    _require(isinstance(lists, list) and all(isinstance(each, list) for each in lists))
    found = tuple(tuple(each) for each in lists)
    hash(found)  # a TypeError for nested lists
    return found


def _integer(value: Any) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool))
    return int(value)


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError
