"""Writes and reads ``interventions.jsonl``, from which a replay makes the same interventions again.

One JSON object per line: ``"action": "rollback"`` is an `Intervention`, ``"action": "accept"`` an `AcceptedLevel`.
``"action": "resume"`` records the step at which the run was resumed: earlier lines with later steps describe steps that
the resume discarded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from lightning.pytorch import LightningModule, Trainer

from stabletrain.errors import UserError
from stabletrain.runtime.records import run_files
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.records.json_lines import JsonLines
from stabletrain.runtime.records.recipe import recipe_hash
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Identity, Intervention

_KEY = "config key plugins.spike.replay"


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


class InterventionLog:
    """Appends to the log of a run; the file is created with the first intervention.

    Args:
        path: of the file; None: write nothing, as on ranks other than 0.
        fingerprint: of the run.
    """

    def __init__(self, path: Path | None, fingerprint: Fingerprint) -> None:
        self._file = JsonLines(path, "interventions")
        self._fingerprint = fingerprint

    def append(self, made: Intervention | AcceptedLevel) -> None:
        """Write a rollback or an accepted level."""
        action = "accept" if isinstance(made, AcceptedLevel) else "rollback"
        self._write({"action": action, **made._asdict(), **self._fingerprint._asdict()})

    def record_resume(self, step: int, earlier: Iterable[Intervention | AcceptedLevel] = ()) -> None:
        """Record that the run was resumed from a checkpoint.

        Args:
            step: attempted steps in the checkpoint.
            earlier: all interventions in the checkpoint; if the log does not exist yet, as in a new folder, it starts
                with them, so that a replay needs this log alone.
        """
        if self._file.path is not None and self._file.path.exists():
            self._write({"action": "resume", "step": step})
        else:
            for each in sorted(earlier, key=lambda made: made.step):  # `read` takes an earlier step for a restart
                self.append(each)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.append(json.dumps(record))


def read(path: str | Path, fingerprint: Fingerprint) -> list[Intervention | AcceptedLevel]:
    """The rollbacks and accepted levels of a log, in the order of their steps, without those that a restart discarded.

    Args:
        path: of the log, or of a run's folder.
        fingerprint: of the run that is to repeat them.

    Raises:
        UserError: if the log cannot be read, or belongs to another run.
    """
    path = Path(path).expanduser()
    file = path / run_files.INTERVENTIONS if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"rollback: replay={str(path)!r} cannot be read: {error.strerror}; expected the {run_files.INTERVENTIONS} "
            f"of a run that rolled back, or that run's folder ({_KEY})"
        ) from None
    found: list[Intervention | AcceptedLevel] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            action, step = record.pop("action"), record["step"]
            found = [each for each in found if each.step <= step - (action != "resume")]
            if action != "resume":
                _require_same(Fingerprint(*(record.pop(field) for field in Fingerprint._fields)), fingerprint, file)
                found.append(_level(record) if action == "accept" else _rollback(record))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines) and number > 1:  # the process was killed while it wrote this line
                logger.warning("rollback: the last line of %s is incomplete and is ignored", file)
                continue
            raise UserError(
                f"rollback: line {number} of {file} is no intervention; expected an {run_files.INTERVENTIONS} ({_KEY})"
            ) from None
    return found


def _rollback(record: dict[str, Any]) -> Intervention:
    before, after = record["applied"]
    return Intervention(
        **{
            **record,
            "applied": (int(before), int(after)),
            "excluded": _identities(record["excluded"]),
            "samples": _identities(record["samples"]),
        }
    )


def _level(record: dict[str, Any]) -> AcceptedLevel:
    signals = {name: tuple(map(float, record[name])) for name in ("losses", "norms")}
    return AcceptedLevel(**{**record, **signals, "given_back": _identities(record["given_back"])})


def _identities(lists: Sequence[Sequence[Any]]) -> tuple[Identity, ...]:
    return tuple(tuple(each) for each in lists)


def _require_same(theirs: Fingerprint, mine: Fingerprint, file: Path) -> None:
    if theirs == mine:
        return
    descriptions = {
        "model": "another model or optimizer",
        "recipe": "another recipe (seed, data, optimizer, schedule, plugins, chaos, precision or trainer differ)",
        "processes": f"{theirs.processes} processes, and this one has {mine.processes}",
    }
    different = [descriptions[name] for name in Fingerprint._fields if getattr(theirs, name) != getattr(mine, name)]
    raise UserError(
        f"rollback: {file} is the log of a run with {'; '.join(different)}: it cannot be replayed here. Replay it with "
        "its own recipe, or train without a replay (config key plugins.spike.replay=null)"
    )
