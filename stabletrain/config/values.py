"""Values of the config's own keys that have the right type, but with which a run would fail, or do nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stabletrain.config.problems import Problem
from stabletrain.core.intervals import seconds
from stabletrain.errors import UserError
from stabletrain.runtime.records.writable import unwritable

MOST_THREADS = 1024
"""OpenMP ends the process, or crashes, if it cannot make them: 4096 work here, 16384 do not."""
MOST_PROCESSES = 1024
MOST_NODES = 100_000

_Range = tuple[str, Callable[[float], bool]]
_AT_LEAST_0: _Range = ("at least 0", lambda x: x >= 0)
_AT_LEAST_1: _Range = ("at least 1", lambda x: x >= 1)
_ABOVE_0: _Range = ("above 0", lambda x: x > 0)
_OR_ENDLESS: _Range = ("at least 1, or -1 for no limit; with 0 nothing is trained", lambda x: x >= 1 or x == -1)

TRAINER: dict[str, _Range] = {
    "max_steps": _OR_ENDLESS,
    "max_epochs": _OR_ENDLESS,
    "min_steps": _AT_LEAST_0,
    "min_epochs": _AT_LEAST_0,
    "limit_train_batches": ("above 0; with 0 nothing is trained", lambda x: x > 0),
    "limit_val_batches": _AT_LEAST_0,
    "limit_test_batches": _AT_LEAST_0,
    "limit_predict_batches": _AT_LEAST_0,
    "overfit_batches": _AT_LEAST_0,
    "val_check_interval": ("above 0; trainer.limit_val_batches=0 for no validation", lambda x: x > 0),
    "check_val_every_n_epoch": _AT_LEAST_1,
    "num_sanity_val_steps": ("at least 0, or -1 for all", lambda x: x >= -1),
    "log_every_n_steps": _AT_LEAST_0,
    "accumulate_grad_batches": _AT_LEAST_1,
    "gradient_clip_val": _ABOVE_0,
    "reload_dataloaders_every_n_epochs": _AT_LEAST_0,
    "num_nodes": _AT_LEAST_1,
}
"""Arguments of Lightning's Trainer: what it refuses late, or never."""

_MOST_SECONDS = 30 * 24 * 3600
MOST_RESTARTS = 1_000_000
_LAUNCH = {
    "threads": MOST_THREADS,
    "processes": MOST_PROCESSES,
    "nodes": MOST_NODES,
    "restarts": MOST_RESTARTS,
    "progress_steps": 10**12,
}


def check_values(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the values out of range, and the paths that cannot be written, of a config's own keys.

    Args:
        config: composed; values of the wrong type are reported elsewhere.
    """
    yield from _trainer(config.get("trainer"))
    yield from _launch(config.get("launch"))
    yield from _fault(config)
    run_dir = config.get("run_dir")
    if isinstance(run_dir, str) and not run_dir.isprintable():
        yield Problem("run_dir", f"expected a path without control characters, got {run_dir!r:.200}")
    elif isinstance(run_dir, str) and (reason := unwritable(run_dir, folder=True, parents=True)):
        yield Problem("run_dir", f"{reason}; choose a folder with write permission, run_dir=FOLDER, or null")


def _trainer(node: object) -> Iterator[Problem]:
    if not isinstance(node, Mapping):
        return
    for argument, (expected, fits) in TRAINER.items():
        value = node.get(argument)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and not fits(value):
            yield Problem(f"trainer.{argument}", f"expected {expected}, got {value!r}")
    max_time = node.get("max_time")
    if isinstance(max_time, str) and max_time and not max_time.strip("0:"):
        yield Problem("trainer.max_time", f"expected more than no time (DD:HH:MM:SS), got {max_time!r}")
    if isinstance(max_time, Mapping):
        numbers = [value for value in max_time.values() if isinstance(value, int | float)]
        if not all(value >= 0 for value in numbers) or not any(numbers):
            yield Problem("trainer.max_time", f"expected more than no time, got {dict(max_time)!r:.200}")


def _launch(node: object) -> Iterator[Problem]:
    if not isinstance(node, Mapping):
        return
    for key, most in _LAUNCH.items():
        value = node.get(key)
        if isinstance(value, int) and value > most:
            yield Problem(f"launch.{key}", f"expected at most {most}, got {value}")
    for key in ("timeout", "join_timeout"):
        given = node.get(key)
        if isinstance(given, int | str) and not isinstance(given, bool):
            try:
                limit = seconds(given, name=f"launch.{key}")
            except UserError as error:
                yield Problem(f"launch.{key}", str(error).removeprefix(f"launch.{key}: "))
            else:
                if limit > _MOST_SECONDS or limit < 1:
                    yield Problem(f"launch.{key}", f"expected 1 to {_MOST_SECONDS} s, got {given!r}")


def _fault(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A fault on a rank or at a step that the run does not have would never happen."""
    node, launch, trainer = (config.get(key) for key in ("chaos", "launch", "trainer"))
    if not isinstance(node, Mapping):
        return
    if isinstance(launch, Mapping):
        numbers = [launch.get(key) for key in ("processes", "nodes")]
        rank = node.get("rank")
        ranks = math.prod(number for number in numbers if isinstance(number, int))
        if isinstance(rank, int) and rank >= ranks > 0:
            text = f"expected null or one of the {ranks} ranks (launch.processes x launch.nodes), from 0; got {rank}"
            yield Problem("chaos.rank", text)
    steps = trainer.get("max_steps") if isinstance(trainer, Mapping) else None
    at_step = node.get("at_step")
    if isinstance(steps, int) and isinstance(at_step, int) and at_step >= steps > 0:
        yield Problem("chaos.at_step", f"expected a step before the end, trainer.max_steps={steps}, got {at_step}")
