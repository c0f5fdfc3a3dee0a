"""Determine how a run ended, also if its worker died without writing a result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stabletrain.config.resume import checkpoint_of_run
from stabletrain.core.intervals import seconds
from stabletrain.launch.first_cause import by_signal, first_cause, without_result
from stabletrain.launch.process import ProcessEnd
from stabletrain.launch.rank_ends import read_ends, read_exit_codes
from stabletrain.launch.result import Result, read_result


def final_result(config: Mapping[str, Any], ended: ProcessEnd, spare: Path | None = None) -> Result:
    """Return how a run ended, from what its processes wrote and how they ended, and write it to result.json.

    A result.json that cannot be written is a warning: the run has ended as it did.

    Args:
        config: the resolved config.
        ended: how the worker's process ended.
        spare: the second folder of the processes' ends; None if there is none.
    """
    folder = Path(config["run_dir"])
    found = first_cause(
        read_ends(folder, spare),
        ended,
        size=number_of_processes(config),
        exits=read_exit_codes(spare),
        timeout=waiting_limit(config),
    )
    result = found or _without_ends(folder, ended)
    if result.checkpoint is None:
        checkpoint = checkpoint_of_run(folder)
        result = replace(result, checkpoint=str(checkpoint) if checkpoint else None)
    try:
        result.write(folder)
    except OSError as error:
        logging.getLogger("stabletrain").warning(
            "result.json cannot be written to %s (%s); the result is printed below", folder, error.strerror or error
        )
    return result


def number_of_processes(config: Mapping[str, Any]) -> int:
    """Return how many processes a run has.

    Args:
        config: the resolved config.
    """
    launch = config["launch"]
    return int(launch["processes"]) * int(launch["nodes"])


def waiting_limit(config: Mapping[str, Any]) -> float | None:
    """Return ``launch.timeout`` in seconds; None in a run.yaml of an earlier version, which has none.

    Args:
        config: the resolved config.
    """
    timeout = config["launch"].get("timeout")
    return None if timeout is None else seconds(timeout, name="launch.timeout")


def _without_ends(folder: Path, ended: ProcessEnd) -> Result:
    result = read_result(folder)
    if result is None:
        result = by_signal(ended) if ended.signum is not None else without_result(ended.code)
    return result
