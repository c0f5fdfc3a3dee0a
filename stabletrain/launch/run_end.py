"""What MLflow shows of how a run ended: its outcome and its description."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stabletrain.launch.outcome_tag import outcome_of
from stabletrain.launch.result import Result
from stabletrain.runtime.records.run_files import STEPS
from stabletrain.runtime.records.steps_file import Flag, Steps, read_steps

OUTCOME = "stabletrain.outcome"
"""The tag of the outcome."""
PURPOSE = "stabletrain.purpose"
"""Tag of a run that is no training of its recipe, such as a range test: it has no outcome."""
_LAST = 50
"""Steps whose mean loss is that of the end."""


def describe_end(config: Mapping[str, Any], result: Result) -> None:
    """Write the outcome of a run and the end of its description into the store.

    Args:
        config: the content of run.yaml, with the store and the run's id.
        result: how the run ended.

    Raises:
        StoreError: if the store cannot be used.
    """
    from stabletrain.tracking.description import NOTE, note_at_end
    from stabletrain.tracking.runs import write_tags
    from stabletrain.tracking.sqlite_file import check_file
    from stabletrain.tracking.store import open_client
    from stabletrain.tracking.store_errors import translate_errors

    uri, run_id, folder = config["logger"]["tracking_uri"], config["logger"]["run_id"], Path(config["run_dir"])
    outcome = outcome_of(folder, result, uri)
    with translate_errors(uri):
        check_file(uri)
        client = open_client(uri)
        present = client.get_run(run_id).data.tags
        if PURPOSE in present:  # a range test diverges by design
            outcome = None
        note = present.get(NOTE, "")
        tags = {NOTE: note_at_end(note, end_of(result, outcome), numbers_of_end(folder, result))}
        write_tags(client, run_id, tags | ({OUTCOME: outcome} if outcome else {}))


def forget_end(uri: str, run_id: str) -> None:
    """Remove the outcome of a run that goes on.

    Args:
        uri: tracking URI of the store.
        run_id: the run.
    """
    from stabletrain.tracking.store import open_client
    from stabletrain.tracking.store_errors import translate_errors

    with translate_errors(uri):
        client = open_client(uri)
        if OUTCOME in client.get_run(run_id).data.tags:
            client.delete_tag(run_id, OUTCOME)


def end_of(result: Result, outcome: str | None) -> str:
    """Return how a run ended, in one line.

    >>> end_of(Result(end="finished", steps=600, seconds=11.4), "healthy")
    'finished after 600 steps, 11 s; healthy'
    """
    length = f" after {result.steps} steps, {result.seconds:.0f} s" if result.seconds else ""
    word = f"; {outcome}" if outcome and outcome != result.end else ""
    why = f": {result.message}" if result.message and result.end != "finished" else ""
    return f"{result.end}{length}{word}{why}"


def numbers_of_end(folder: Path, result: Result) -> dict[str, str]:
    """Return the three numbers that matter of a run: its loss, what the plugins left out, its speed.

    Args:
        folder: the run's folder.
        result: how the run ended.
    """
    from stabletrain.tracking.description import number

    steps: Steps | None = None
    with suppress(OSError):
        steps = read_steps(folder / STEPS)
    found: dict[str, str] = {}
    name = next((each for each in ("val/loss", "stability/loss", "train/loss") if each in result.metrics), None)
    if name == "val/loss" or (name is not None and (steps is None or not len(steps.step))):
        found[name] = number(result.metrics[name])
    elif steps is not None and len(steps.step) and not any(n.startswith("stability/loss/") for n in result.metrics):
        last = steps.loss[(steps.flags & (Flag.SKIPPED | Flag.OVERFLOW)) == 0][-_LAST:]
        found[f"loss, mean of the last {len(last)} steps"] = number(float(last.mean()) if len(last) else math.nan)
    if steps is not None and len(steps.step):
        skipped = int(((steps.flags & Flag.SKIPPED) != 0).sum())
        rollbacks = result.metrics.get("stability/rollbacks", 0.0)
        also = f", {rollbacks:.0f} rollbacks" if rollbacks else ""
        found["steps left out"] = f"{skipped} of {len(steps.step)}{also}"
    if "throughput/step_s" in result.metrics:
        found["seconds per step"] = number(result.metrics["throughput/step_s"])
    return found
