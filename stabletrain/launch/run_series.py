"""What a run has recorded as a `Series`, for findings: every step from ``steps.bin``, else the sampled metrics.

All of it may come from anybody, or from another tool: what is missing or makes no sense is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabletrain.config import discovery
from stabletrain.core import metric_names
from stabletrain.core.events import Event
from stabletrain.errors import UserError
from stabletrain.launch.curve_names import names_of
from stabletrain.launch.recorded_run import RecordedRun, run_in_folder
from stabletrain.runtime.records.json_lines import read_lines
from stabletrain.runtime.records.run_files import INTERVENTIONS
from stabletrain.runtime.records.steps_file import Flag, Steps
from stabletrain.tracking import series
from stabletrain.tracking.series import Layer, Rollback, Series

_INDEX = re.compile(r"(.*?\.)(\d+)(\..*)?")
_BY_DESIGN = ("announced", "accept")
_MOST_REPORTED = 100_000


def series_of_folder(folder: Path, uri: str | None = None) -> Series:
    """Return what the run in a folder has recorded, in the folder and in its store if that is a file on this machine.

    Args:
        folder: the run's folder, with run.yaml.
        uri: tracking URI of its store, which is not asked if it is another one; None: the default.

    Raises:
        UserError: if it is not the folder of a run, or the store cannot be read.
    """
    return series_of_run(run_in_folder(folder, command="report", uri=uri, remote=False))


def series_of_run(run: RecordedRun) -> Series:
    """Return what a run has recorded.

    Args:
        run: from `find_run`.

    Raises:
        UserError: if the store cannot be read.
    """
    found, config, rates = loss_series(run), _config(run), _rates(run)
    return replace(
        found,
        rates=rates,
        lr=None if rates is None or not len(found.step) else np.interp(found.step, *rates),
        loss_scale=run.metrics.get("stability/loss_scale"),
        validation=_validation(run),
        layers=_layers(run),
        bound=_fixed_bound(config),
        clips_tensors=_clips_tensors(config),
    )


def loss_series(run: RecordedRun) -> Series:
    """Return what a run has recorded of its loss and of each step, without what only some findings need.

    Args:
        run: from `find_run`.

    Raises:
        UserError: if the store cannot be read.
    """
    found = run.steps()
    values = _of_steps(found) if found is not None and len(found.step) else _of_metrics(run)
    step: NDArray[np.int64] = values["step"]
    events = run.events()
    return Series(
        **values,
        rollbacks=_rollbacks(run, events),
        changes=_changes(events, step),
        spikes=[event.step for event in events if _is_of_the_loss(event)],
        mixed=any(name.startswith("stability/loss/") for name in run.metrics),
    )


def loss_history(run: RecordedRun) -> tuple[str, list[tuple[int, float]]]:
    """Return the metric that is taken for a run's training loss, with its values; an empty name if there is none.

    Args:
        run: from `find_run`.
    """
    name, history = "", list[tuple[int, float]]()
    for each in names_of("loss", run.metrics):
        values = run.history(each)
        if len(values) > len(history):
            name, history = each, values
        if len(history) >= series.MIN_POINTS:
            break
    return name, history


def _of_steps(found: Steps) -> dict[str, Any]:
    def marked(flag: Flag) -> series.Floats:
        return np.where(found.flags & flag.value, 1.0, 0.0)

    return {
        "step": found.step,
        "loss": found.loss,
        "grad_norm": found.grad_norm if np.isfinite(found.grad_norm).any() else None,
        "clipped": marked(Flag.CLIPPED),
        "skipped": marked(Flag.SKIPPED),
        "overflow": marked(Flag.OVERFLOW),
        "without_loss": marked(Flag.NO_LOSS),
    }


def _of_metrics(run: RecordedRun) -> dict[str, Any]:
    """Loss, norm and counts at the steps at which the loss was logged."""
    step, loss = _arrays(loss_history(run)[1])
    gaps = np.diff(step)
    every = max(1, int(np.median(gaps))) if len(gaps) else 1
    values: dict[str, Any] = {"step": step, "loss": loss, "every": every}
    norm = _first("grad_norm", run)
    if norm is not None and len(step):
        values["grad_norm"] = _at(step, *_arrays(run.history(norm)))
    if not len(step):
        return values
    if "stability/clipped_share" in run.metrics:
        share = _at(step, *_arrays(run.history("stability/clipped_share")))
        values["clipped"] = np.nan_to_num(np.clip(share, 0, 1)) * every
    for key, metric in (("skipped", "stability/skipped"), ("overflow", "stability/overflows")):
        if metric in run.metrics:
            steps, counts = _arrays(run.history(metric))
            total = np.interp(step, steps[np.isfinite(counts)], counts[np.isfinite(counts)]) if len(steps) else 0 * loss
            values[key] = np.maximum(np.diff(total, prepend=0.0), 0.0)
    return values


def _at(step: NDArray[np.int64], steps: NDArray[np.int64], values: series.Floats) -> series.Floats:
    """The values at some steps; NaN where there is none."""
    result = np.full(len(step), np.nan)
    _, ours, theirs = np.intersect1d(step, steps, assume_unique=True, return_indices=True)
    result[ours] = values[theirs]
    return result


def _rates(run: RecordedRun) -> tuple[NDArray[np.int64], series.Floats] | None:
    name = _first("lr", run)
    if name is None:
        return None
    steps, values = _arrays(run.history(name))
    finite = np.isfinite(values)
    return (steps[finite], values[finite]) if finite.any() else None


def _validation(run: RecordedRun) -> tuple[NDArray[np.int64], series.Floats]:
    name = _first("val_loss", run)
    return _arrays([] if name is None else run.history(name))


def _first(curve: str, run: RecordedRun) -> str | None:
    return next(iter(names_of(curve, run.metrics)), None)


def _arrays(history: Sequence[tuple[int, float]]) -> tuple[NDArray[np.int64], series.Floats]:
    steps = np.array([step for step, _ in history], dtype=np.int64)
    return steps, np.array([value for _, value in history], dtype=np.float64)


def _layers(run: RecordedRun) -> list[Layer]:
    """The layers of the longest list of modules, such as ``model.blocks.0`` to ``.11``: they are of one kind and size,
    and their order is known."""
    prefix = f"{metric_names.LAYERS}grad_norm/"
    lists: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in run.metrics:
        match = _INDEX.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match is not None:
            lists.setdefault((match[1], match[3] or ""), []).append((int(match[2]), name))
    by_length = sorted(lists.values(), key=len)
    longest = sorted(by_length[-1]) if by_length else []
    if len(longest) < 3:
        return []
    last = [run.metrics[name] for _, name in longest]
    if not last[0] < 1e-2 * max(last):  # far from a finding: spares the histories of all layers
        return [Layer(name.removeprefix(prefix), value) for (_, name), value in zip(longest, last, strict=True)]
    return [Layer(name.removeprefix(prefix), series.median(_arrays(run.history(name))[1])) for _, name in longest]


def _rollbacks(run: RecordedRun, events: Sequence[Event]) -> list[Rollback]:
    path = run.file(INTERVENTIONS)
    if path is None:
        return [Rollback(event.step) for event in events if event.kind == "rollback"]
    made: list[Rollback] = []
    with suppress(OSError):
        for line in read_lines(path):
            record = line.record or {}
            step, to, excluded = record.get("step"), record.get("to"), record.get("excluded")
            if not isinstance(step, int) or len(made) >= _MOST_REPORTED:
                continue
            if record.get("action") == "resume":  # what came after the checkpoint is made anew
                made = [each for each in made if each.step <= step]
            elif record.get("action") == "rollback":
                batches = excluded if isinstance(excluded, list) else []
                made.append(Rollback(step, to if isinstance(to, int) else None, frozenset(map(json.dumps, batches))))
    return made


def _changes(events: Sequence[Event], step: NDArray[np.int64]) -> list[int]:
    last = int(step[-1]) if len(step) else 0
    return sorted({event.step for event in events if event.kind in _BY_DESIGN and 0 < event.step <= last})


def _is_of_the_loss(event: Event) -> bool:
    """Whether a detector has reported a loss above its limit; a reason begins with the signal."""
    return event.kind == "divergence" or (event.kind == "spike" and event.reason.startswith("loss"))


def _config(run: RecordedRun) -> Mapping[str, Any]:
    with suppress(UserError):
        return run.config() or {}
    return {}


def _plugins(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    node = config.get("plugins")
    if isinstance(node, Mapping):
        yield from (each for each in node.values() if isinstance(each, Mapping) and each.get("_target_"))


def _fixed_bound(config: Mapping[str, Any]) -> float | None:
    """The bound of a plugin whose one argument it is."""
    for node in _plugins(config):
        bound = node.get("max_norm")
        if node.keys() <= {"_target_", "max_norm", "name"} and isinstance(bound, int | float) and bound > 0:
            return float(bound)
    return None


def _clips_tensors(config: Mapping[str, Any]) -> bool:
    targets = {str(node["_target_"]) for node in _plugins(config)}
    transforms = [plugin for plugin in discovery.plugins().values() if plugin.kind == "transform"]
    return any(
        str(discovery.content(option).get("_target_")) in targets for plugin in transforms for option in plugin.options
    )
