"""What is known of a run once its first batch is there: data and weights by content, and the settings of each node."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from stabletrain.runtime import rng
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.internals.trainer import unwrapped
from stabletrain.runtime.ranks import Ranks
from stabletrain.runtime.records.checksums import checksum, combined, weights_checksum
from stabletrain.tracking.record import current_settings, environment, node_entry

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger("stabletrain")

_DIVIDES = (*both(ModelParallelStrategy), *both(FSDPStrategy))


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """The record of a run's start.

    Args:
        environment: the content of environment.json.
        data: the content of data.json: ``fingerprint``, what the data module says; ``first_batch`` and
            ``initial_weights``, checksums, None if unknown; ``parts``, of how many different parts each is made, by
            rank; ``ranks``, of how many processes.
    """

    environment: dict[str, Any]
    data: dict[str, Any]


def record_start(
    trainer: Trainer, batch: Any, record: Mapping[str, Any] | None = None, *, alone: bool = False
) -> StartRecord | None:
    """Return the record of a start; None on ranks other than 0. A collective, unless it is made alone.

    No random number is drawn, no loader is advanced, and nothing is changed.

    Args:
        trainer: in ``on_train_batch_start`` of the first batch.
        batch: that batch, on the device.
        record: of this process, from `stabletrain.tracking.environment`, if it was made before.
        alone: whether rank 0 alone calls this. It then sees its own batch, and no weights that are divided.
    """
    alone = alone or trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized())
    weights = None
    # a process that lets its shards be as the optimizer has them, while the others do not, would wait for them later
    if not (alone and trainer.world_size > 1 and isinstance(trainer.strategy, _DIVIDES)):
        weights = _checksum("the initial weights", weights_checksum, unwrapped(trainer.lightning_module))
    data = None if batch is None else _checksum("the first batch", checksum, batch)
    leads_node = trainer.is_global_zero or (trainer.num_nodes > 1 and trainer.local_rank == 0)
    mine = _settings(trainer, record) if leads_node else None
    entry = None if mine is None else node_entry(mine, trainer.global_rank)
    everyone = [(weights, data, entry)] if alone else Ranks(trainer).gather((weights, data, entry))
    if not trainer.is_global_zero or mine is None:
        return None
    initial_weights, parts_of_weights = combined(each[0] for each in everyone)
    first_batch, parts_of_batch = combined(each[1] for each in everyone)
    content = {
        "fingerprint": fingerprint_of(getattr(trainer, "datamodule", None)),
        "first_batch": first_batch,
        "initial_weights": initial_weights,
        "parts": {"first_batch": parts_of_batch, "initial_weights": parts_of_weights},
        "ranks": len(everyone),
    }
    nodes = [each[2] for each in everyone if each[2] is not None]
    return StartRecord(environment={**mine, "nodes": nodes}, data=content)


def fingerprint_of(data: Any) -> dict[str, str] | None:
    """Return name and digest of the data, as a data module's method ``fingerprint`` says; None if it has none.

    The method takes no arguments and returns ``{"name": ..., "digest": ...}``. It is called on rank 0 only. If
    it fails, or returns something else, that is a warning.

    Args:
        data: the data module; None: there is none.
    """
    method = getattr(data, "fingerprint", None)
    if not callable(method) or not _takes_nothing(method):
        return None
    expected = "expected a dictionary of texts {'name': ..., 'digest': ...}"
    try:
        with rng.preserved():
            found = method()
    except Exception as error:  # the user's code, and no reason to end a run
        logger.warning("%s.fingerprint: %s, got %s: %s", type(data).__name__, expected, type(error).__name__, error)
        return None
    values = (found.get("name"), found.get("digest")) if isinstance(found, Mapping) else ()
    if not values or not all(isinstance(each, str) and each for each in values):
        logger.warning("%s.fingerprint: %s, got %.200r", type(data).__name__, expected, found)
        return None
    return {"name": str(values[0]), "digest": str(values[1])}


def _takes_nothing(method: Any) -> bool:
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):  # another method of that name; or a builtin
        return False
    return True


def _settings(trainer: Trainer, record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    try:
        return {**(record or environment(trainer)), **current_settings(trainer)}
    except Exception as error:  # on one rank alone: the others wait for it
        logger.warning("the run's environment is not recorded: %s: %s", type(error).__name__, error)
        return None


def _checksum(what: str, function: Any, value: Any) -> str | None:
    try:
        found: str = function(value)
    except Exception as error:  # nothing that a record cannot read ends a run, or leaves the other ranks waiting
        logger.info("%s have no checksum in the run's record: %s", what, error)
        return None
    return found
