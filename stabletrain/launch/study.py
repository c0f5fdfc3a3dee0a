"""Optuna's study of a sweep: in a file of its own, asked for the next values, and told how each run ended.

The file is not MLflow's: both programs keep the version of their tables in a table of one name, and Optuna refuses a
database in which it finds MLflow's.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stabletrain.config.search_space import Dimension
from stabletrain.errors import UserError
from stabletrain.tracking.naming import flatten
from stabletrain.tracking.ownership import Owner, is_gone, this_process
from stabletrain.tracking.store_errors import sqlite_path

if TYPE_CHECKING:
    import optuna

FILE = "optuna.db"
TRIAL_ENV = "STABLETRAIN_TRIAL"
"""Environment variable of a trial's worker, with JSON: the arguments of `stabletrain.launch.pruning.PruneTrial`."""
_SPACE, _OBJECTIVE, _CONFIG, _OWNER = "space", "objective", "config", "owner"
_NOT_COMPARED = ("run_dir", "logger", "resume", "dry_run", "memory", "launch.detach", "launch.timeout")
"""Keys that change nothing of what a run computes."""
_MOST_SHOWN = 5

State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a sweep looks for.

    Args:
        metric: its name.
        direction: whether less or more is better.
    """

    metric: str
    direction: Literal["minimize", "maximize"]

    def __str__(self) -> str:
        return f"{self.direction} {self.metric}"


def default_storage(uri: str | None) -> str:
    """Return the address of the studies' database: a file beside that of the tracking store.

    Args:
        uri: tracking URI of the store; None, or one of a server: the file is in the current folder.
    """
    database = sqlite_path(uri) if uri is not None else None
    return storage_address(str((database.parent if database is not None else Path.cwd()) / FILE))


def storage_address(text: str) -> str:
    """Return the address of a database: a path becomes one of a sqlite file.

    Args:
        text: as typed.
    """
    return text if "://" in text else f"sqlite:///{Path(text).expanduser().absolute()}"


def open_storage(address: str) -> Any:
    """Open the studies' database, which several processes may use at a time.

    Args:
        address: from `storage_address`.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = {"connect_args": {"timeout": 30}} if address.startswith("sqlite:") else None
    return optuna.storages.RDBStorage(address, engine_kwargs=options)


class Study:
    """A study, new or gone on with.

    Args:
        address: of the database.
        name: of the study.
        space: what may vary.
        goal: what is looked for.
        config: a composed config, of which the keys of the space do not count.
        seed: of the sampler; that of a trial follows from it and from the trial's number, so that a sweep that is gone
            on with does not propose its first values again.

    Raises:
        UserError: if the database cannot be used, or the study is of another space, goal or config.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str,
        space: Sequence[Dimension],
        goal: Goal,
        config: Mapping[str, Any],
        seed: int,
    ) -> None:
        import optuna

        self.address, self.name, self._space, self._seed = address, name, tuple(space), seed
        with _translated(address):
            _refuse_foreign(address)
            self._storage = open_storage(address)
            self._study = optuna.create_study(
                study_name=name, storage=self._storage, direction=goal.direction, load_if_exists=True
            )
            self._id = self._storage.get_study_id_from_name(name)
            self._check(goal, config)
            self.abandoned = self._settle()

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials, in the order of their numbers."""
        with _translated(self.address):
            return list(self._study.get_trials(deepcopy=False))

    def ask(self) -> Trial:
        """Return the next values to try."""
        import optuna

        with _translated(self.address):
            number = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = optuna.samplers.TPESampler(seed=(self._seed * 100_003 + number) % 2**32)
            trial = self._study.ask({each.key: _distribution(each) for each in self._space})
            trial.set_user_attr(_OWNER, this_process().to_tag())
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
        words = tuple(f"{each.key}={each.text(trial.params[each.key])}" for each in self._space)
        shown = " ".join(f"{each.key}={each.shown(trial.params[each.key])}" for each in self._space)
        return Trial(number=trial.number, id=trial_id, words=words, shown=shown)

    def tell(self, number: int, state: State, value: float | None = None, **notes: Any) -> None:
        """Record how a trial ended.

        A run that diverged, or that a plugin stopped, is ``pruned``: the sampler learns from pruned trials that these
        values are bad, and ignores failed ones. ``failed`` is for bugs and kills, which say nothing about the values.

        Args:
            number: of the trial.
            state: how it ended.
            value: of the objective; of complete trials.
            notes: further facts about it, such as the id of its run.
        """
        from optuna.trial import TrialState

        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        with _translated(self.address):
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
            for key, note in notes.items():
                self._storage.set_trial_user_attr(trial_id, key, note)
            self._study.tell(number, value, state=states[state])

    def _check(self, goal: Goal, config: Mapping[str, Any]) -> None:
        """Refuse a study whose trials cannot be compared with those to come; write into a new one what it is of."""
        keys = tuple(each.key.replace("/", ".") for each in self._space)
        flat = {key: repr(value) for key, value in flatten(config) if not _is_below(key, (*_NOT_COMPARED, *keys))}
        mine = {_SPACE: sorted(map(str, self._space)), _OBJECTIVE: str(goal)}
        theirs, count = self._study.user_attrs, len(self._study.get_trials(deepcopy=False))
        if _SPACE not in theirs and count:
            raise UserError(f"sweep: the study {self.name!r} was not made by stabletrain; name another (--study NAME)")
        if _SPACE not in theirs:
            for key, value in {**mine, _CONFIG: json.dumps(flat)}.items():
                self._study.set_user_attr(key, value)
            return
        other = f"; name another study (--study NAME), or repeat that sweep: {count} trials are in {self.address}"
        if theirs[_SPACE] != mine[_SPACE]:
            was, now = " ".join(theirs[_SPACE]), " ".join(mine[_SPACE])
            raise UserError(f"sweep: the study {self.name!r} is of another search space, {was}, got {now}{other}")
        if theirs[_OBJECTIVE] != mine[_OBJECTIVE]:
            raise UserError(f"sweep: the study {self.name!r} is to {theirs[_OBJECTIVE]}, got {goal}{other}")
        before = json.loads(theirs[_CONFIG])
        differ = sorted(key for key in {*before, *flat} if before.get(key) != flat.get(key))
        if differ:
            shown = ", ".join(
                f"{key} {before.get(key, 'absent')} -> {flat.get(key, 'absent')}" for key in differ[:_MOST_SHOWN]
            )
            more = f" and {len(differ) - _MOST_SHOWN} more" if len(differ) > _MOST_SHOWN else ""
            raise UserError(f"sweep: the study {self.name!r} is of another config: {shown}{more}{other}")

    def _settle(self) -> int:
        """Tell FAIL for the trials that a killed sweep left RUNNING, and return how many; not for those of others."""
        from optuna.trial import TrialState

        left = 0
        for each in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = Owner.of(str(each.user_attrs.get(_OWNER, "")))
            if owner is None or is_gone(owner, same_disk=self.address.startswith("sqlite:")):
                self._study.tell(each.number, state=TrialState.FAIL)
                left += 1
        return left


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Values to try.

    Args:
        number: in its study.
        id: in the database.
        words: as overrides.
        shown: the same with four digits.
    """

    number: int
    id: int
    words: tuple[str, ...]
    shown: str


def _distribution(dimension: Dimension) -> Any:
    from optuna import distributions

    if dimension.choices:
        return distributions.CategoricalDistribution(dimension.choices)
    if dimension.is_whole:
        return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.is_log)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.is_log)


def _is_below(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _refuse_foreign(address: str) -> None:
    """Refuse a database with other tables before Optuna adds its own to it."""
    path = sqlite_path(address)
    if path is None or not path.is_file() or not path.stat().st_size:
        return
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and "studies" not in tables:
        raise UserError(
            f"sweep: {path} is a database of another program, in which Optuna would write its tables; choose another "
            "file (--storage FILE)"
        )


@contextmanager
def _translated(address: str) -> Iterator[None]:
    import optuna
    import sqlalchemy

    try:
        yield
    except UserError:
        raise
    except (
        optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError, RuntimeError, ImportError
    ) as error:  # fmt: skip
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"sweep: the studies in {address} cannot be used ({lines[0][:300]}); choose another database "
            "(--storage FILE)"
        ) from None
