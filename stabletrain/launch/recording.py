"""The record of a run in its folder: what the launcher knows, what the worker is, and what the first batch shows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.runtime.records.run_files import ENVIRONMENT
from stabletrain.tracking.code_files import named_packages
from stabletrain.tracking.git_record import git_record, write_git

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger("stabletrain")


def git_of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state in git of the current folder and of the repositories that hold the run's packages.

    Args:
        config: composed, or the content of run.yaml.
    """
    try:
        folder = Path.cwd()
    except OSError:  # it was deleted
        folder = Path(config["run_dir"])
    return git_record(folder, named_packages(config))


def record_git(git: Mapping[str, Any], folder: Path) -> None:
    """Write the state in git into a run's folder.

    Args:
        git: from `git_of_run`.
        folder: the run's folder.
    """
    try:
        write_git(folder / ENVIRONMENT, git)
    except OSError as error:
        _incomplete(folder, error)


class Recording:
    """Writes the worker's part of a run's record. Whatever fails here is a warning: it does not end a run.

    Args:
        config: the content of run.yaml.
        trainer: built.
    """

    def __init__(self, config: Mapping[str, Any], trainer: Trainer) -> None:
        self._config = config
        self._trainer = trainer
        self._folder = Path(config["run_dir"])
        self._record: dict[str, Any] | None = None
        for each in trainer.loggers:
            if getattr(each, "records_itself", None) is True:
                each.records_itself = False  # type: ignore[attr-defined]

    def write(self) -> None:
        """Write environment and code; on rank 0, once the Trainer is built."""
        if not self._trainer.is_global_zero:
            return
        from stabletrain.tracking.own_record import write_built
        from stabletrain.tracking.record import environment, node_entry

        try:
            self._record = environment(self._trainer)
            nodes = [node_entry(self._record, self._trainer.global_rank)]
            write_built(self._folder / ENVIRONMENT, {**self._record, "nodes": nodes}, named_packages(self._config))
        except Exception as error:
            _incomplete(self._folder, error)

    def begin(self, trainer: Trainer, batch: Any) -> None:
        """Write the record again with what the first batch shows, and send it to the logger. A collective.

        Args:
            trainer: in ``on_train_batch_start`` of the first batch.
            batch: that batch.

        Raises:
            UserError: if the nodes of the run have different software.
        """
        from stabletrain.launch.versions import check_nodes
        from stabletrain.tracking.start_record import record_start

        check_nodes(trainer, same_versions=self._config["launch"].get("same_versions", True))
        start = record_start(trainer, batch, self._record)
        if start is None:
            return
        from stabletrain.tracking.own_record import write_start

        try:
            write_start(self._folder / ENVIRONMENT, start)
            name = type(getattr(trainer, "datamodule", None)).__name__
            for each in trainer.loggers:
                if getattr(each, "records_itself", None) is False:
                    each.log_record(self._folder / ENVIRONMENT, start.data, name=name)  # type: ignore[attr-defined]
        except Exception as error:
            _incomplete(self._folder, error)


def _incomplete(folder: Path, error: Exception) -> None:
    logger.warning("the record in %s is incomplete: %s: %s", folder / ENVIRONMENT, type(error).__name__, error)
