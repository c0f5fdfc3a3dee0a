"""The record of what was done to a run, with everything needed to do it once more: ``interventions.jsonl``.

One JSON object a line. ``rollback`` is an intervention; ``resume`` says that the process was started again, after which
later interventions of the file belong to a past that is no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from lightning.pytorch import LightningModule, Trainer

from stabletrain.errors import UserError
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.records.json_lines import JsonLines
from stabletrain.runtime.records.recipe import recipe_hash

NAME = "interventions.jsonl"


class Fingerprint(NamedTuple):
    """What a log belongs to.

    Args:
        model: hash of the parameters' names and shapes and of the optimizer's class.
        recipe: hash of the recipe; None outside of a run started from the command line.
        processes: how many trained together.
    """

    model: str
    recipe: str | None
    processes: int

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule, parameters: Iterable[tuple[str, Any]]) -> Fingerprint:
        """The one of this run.

        Args:
            trainer: in a fit.
            module: the module that is trained.
            parameters: names and parameters.
        """
        shapes = [[name, list(p.shape), str(p.dtype)] for name, p in parameters]
        classes = [type(module).__qualname__, *(type(each).__qualname__ for each in trainer.optimizers)]
        model = xxhash.xxh3_64(json.dumps([classes, shapes]).encode()).hexdigest()
        return cls(model, recipe_hash(Path(trainer.default_root_dir)), trainer.world_size)


class Intervention(NamedTuple):
    """A rollback that was made.

    Args:
        step: attempted steps when it was made.
        to: attempted steps at the snapshot that was restored; None: a checkpoint was.
        checkpoint: path of that checkpoint; None: a snapshot was restored.
        applied: applied steps, before and afterwards.
        excluded: names of the batches left out, as for `TrainLoader.exclude`.
        samples: the same batches by their samples on rank 0, for people.
        rewarm: length of the second warm-up; None: the schedule's own; 0: none.
        baselines: what became of the rules' histories: ``"restore"`` or ``"reset"``.
        plugin: who asked.
        cause: the reason given.
    """

    step: int
    to: int | None
    checkpoint: str | None
    applied: tuple[int, int]
    excluded: tuple[tuple[Any, ...], ...]
    samples: tuple[tuple[Any, ...], ...]
    rewarm: int | None
    baselines: str
    plugin: str
    cause: str

    @property
    def undone(self) -> int:
        """Attempted steps that it undid; of one to a checkpoint, applied steps."""
        return self.applied[0] - self.applied[1] if self.to is None else self.step - self.to


class InterventionLog:
    """Appends to the log of a run; the file appears with the first intervention.

    Args:
        path: None: write nothing (as on ranks other than 0).
        fingerprint: of the run.
    """

    def __init__(self, path: Path | None, fingerprint: Fingerprint) -> None:
        self._file = JsonLines(path, "interventions")
        self._fingerprint = fingerprint

    def append(self, made: Intervention) -> None:
        """Write an intervention."""
        self._write({"action": "rollback", **made._asdict(), **self._fingerprint._asdict()})

    def resumed(self, step: int, made: Iterable[Intervention] = ()) -> None:
        """The process was started again.

        Args:
            step: attempted steps so far.
            made: all interventions until then: a log in another folder begins with them, so that it is whole.
        """
        if self._file.path is not None and self._file.path.exists():
            self._write({"action": "resume", "step": step})
        else:
            for each in made:
                self.append(each)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.append(json.dumps(record))


def read(path: str | Path, fingerprint: Fingerprint) -> list[Intervention]:
    """The interventions of a log, in the order of their steps.

    Args:
        path: of the log, or of a run's folder.
        fingerprint: of the run that is to repeat them.

    Raises:
        UserError: if the log cannot be read, or is another run's.
    """
    path = Path(path).expanduser()
    file = path / NAME if path.is_dir() else path
    key = "config key plugins.spike.replay"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"rollback: replay={str(path)!r} cannot be read: {error.strerror}; expected the {NAME} of a run that "
            f"rolled back, or that run's folder ({key})"
        ) from None
    made: list[Intervention] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            action, step = record.pop("action"), record["step"]
            made = [each for each in made if each.step <= step - (action == "rollback")]
            if action == "rollback":
                theirs = Fingerprint(*(record.pop(field) for field in Fingerprint._fields))
                _compare(theirs, fingerprint, file, key)
                made.append(_from_plain(record))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines) and number > 1:  # a process was killed while it wrote
                logger.warning("%s: the last line is incomplete and is left out", file)
                continue
            raise UserError(
                f"rollback: line {number} of {file} is no intervention; expected an {NAME} ({key})"
            ) from None
    return made


def _from_plain(record: dict[str, Any]) -> Intervention:
    before, after = record["applied"]
    return Intervention(
        **{
            **record,
            "applied": (int(before), int(after)),
            "excluded": names(record["excluded"]),
            "samples": names(record["samples"]),
        }
    )


def names(plain: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    """Batches' names, from lists."""
    return tuple(tuple(each) for each in plain)


def _compare(theirs: Fingerprint, mine: Fingerprint, file: Path, key: str) -> None:
    if theirs == mine:
        return
    what = {
        "model": "another model or optimizer",
        "recipe": "another recipe (seed, data, optimizer, schedule, plugins, chaos, precision or trainer differ)",
        "processes": f"{theirs.processes} processes, and this one has {mine.processes}",
    }
    different = [what[field] for field in Fingerprint._fields if getattr(theirs, field) != getattr(mine, field)]
    raise UserError(
        f"rollback: {file} is the log of a run with {'; '.join(different)}: its interventions mean nothing here. "
        f"Replay it with its own recipe, or leave it out ({key}=null)"
    )
