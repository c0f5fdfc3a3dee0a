"""``stabletrain landscape``: what it prints and writes."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from stabletrain.config.trust import ENV as TRUST_ENV
from stabletrain.errors import UserError
from stabletrain.extras import pip_line
from stabletrain.landscape.of_run import find, folder_of, landscape_of
from stabletrain.landscape.pictures import clipping, draw
from stabletrain.landscape.results import CheckpointLoss, Landscape
from stabletrain.landscape.study import Options
from stabletrain.launch.bounded import write_json
from stabletrain.launch.recorded_run import RecordedRun
from stabletrain.safe_path import append_current_folder

FILE = "landscape.json"


def run(wanted: str, options: Options, *, most: int, surface: bool, trust: Sequence[str]) -> None:
    """Compute the landscape of a run, print it, and write it into the run's folder and its run in MLflow.

    Args:
        wanted: folder, id, prefix of an id, or name of the run.
        options: what to compute.
        most: checkpoints that are used at most.
        surface: whether to draw surfaces, too.
        trust: packages from which the config may build objects.

    Raises:
        UserError: if the run, its checkpoints or its config cannot be used, or the result cannot be written.
    """
    found = find(wanted)
    _trust(trust)
    folder = folder_of(found)
    _make(folder)
    has_pictures = importlib.util.find_spec("matplotlib") is not None
    if not has_pictures:
        _say(f"no pictures: matplotlib is not installed: {pip_line('matplotlib')}")
    if options.has_curvature and importlib.util.find_spec("scipy") is None:
        _say(f"no curvature: scipy is not installed: {pip_line('scipy')}")
        options = replace(options, has_curvature=False)
    result = landscape_of(found, options, _say, most=most, trust=trust)
    result.notes += clipping(result)
    files = [folder / FILE]
    try:
        write_json(files[0], result.as_json())
        if has_pictures:
            files += draw(result, folder, surface=surface)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"landscape: cannot write to {folder} ({why}); free some space, or move it away") from None
    print("\n".join(_lines(result)))
    print("\n".join(f"{'picture' if file.suffix == '.png' else 'numbers'}: {file}" for file in files))
    _log(found, folder)


def _trust(packages: Sequence[str]) -> None:
    """As the launcher does for the process that trains: by the environment, and with the user's own modules."""
    named = {name for name in (*os.environ.get(TRUST_ENV, "").split(","), *packages) if name}
    if named:
        os.environ[TRUST_ENV] = ",".join(sorted(named))
        append_current_folder()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise UserError(
            f"landscape: cannot write to {folder} ({error.strerror or error}); copy the run's folder, and name the copy"
        ) from None


def _log(found: RecordedRun, folder: Path) -> None:
    if found.run_id is None or found.uri is None:
        why = f": its store is {found.unread}, which MLFLOW_TRACKING_URI does not name" if found.unread else ""
        print(f"not logged to MLflow{why}")
        return
    from stabletrain.tracking.artifacts import upload_files

    try:
        upload_files(found.uri, found.run_id, [folder])
    except UserError as error:  # the files are there
        print(f"not logged to MLflow: {error}", file=sys.stderr)
        return
    print(f"logged to MLflow: {folder.name}/ of the run {found.run_id}")


def _say(line: str) -> None:
    print(line, flush=True)


def _lines(result: Landscape) -> Iterator[str]:
    batches = f"{result.batches} batches" if result.batches != 1 else "1 batch"
    stats = "statistics of the batch" if result.batch_stats else "running statistics"
    yield ""
    yield (
        f"{result.name}: {result.parameters} trained weights, the loss of {batches} of the training loader, "
        f"dropout off, BatchNorm by {stats}"
    )
    for name, grid in (("random plane", result.random), ("plane of the checkpoints", result.path)):
        if grid is not None and grid.finite:
            yield f"  {name + ':':<26}loss {grid.finite[0]:.4g} to {grid.finite[-1]:.4g}"
    if result.shares is not None:
        first, second = result.shares
        yield f"  {'variance in that plane:':<26}{first:.1%} + {second:.1%}"
    yield ""
    yield from _table(result.checkpoints)
    yield from _limit_lines(result)
    if result.by_differences:
        yield "  Hessian by differences of gradients: a part of the module has no second derivative to rely on"
    for note in result.notes:
        yield f"  {note}"
    yield f"  {result.passes} forward passes"
    yield ""


def _table(checkpoints: Sequence[CheckpointLoss]) -> Iterator[str]:
    has_plane = any(each.loss_in_plane is not None for each in checkpoints)
    has_curvature = any(each.curvature is not None for each in checkpoints)
    has_limit = has_curvature and any(each.limit is not None and each.limit.value is not None for each in checkpoints)
    head = ["step", "loss", *(["in the plane"] if has_plane else [])]
    head += ["largest", "smallest eigenvalue"] if has_curvature else []
    head += ["stable below"] if has_limit else []
    rows = [head]
    for each in checkpoints:
        row = [str(each.step), _number(each.loss), *([_number(each.loss_in_plane)] if has_plane else [])]
        if has_curvature:
            found = each.curvature
            row += [_number(found.largest), _number(found.smallest)] if found is not None else ["-", "-"]
        if has_limit:
            row.append(_number(None if each.limit is None else each.limit.value))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _limit_lines(result: Landscape) -> Iterator[str]:
    limit = result.centre.limit
    if limit is None or not any(each.curvature is not None for each in result.checkpoints):
        return
    if limit.value is None:
        yield f"  limit of stability: {limit.rule}"
        return
    above = [
        each.step
        for each in result.checkpoints
        if each.curvature is not None
        and each.curvature.largest is not None
        and each.limit is not None
        and each.limit.value is not None
        and each.curvature.largest > each.limit.value
    ]
    steps = f"above it at steps {', '.join(map(str, above))}" if above else "no checkpoint is above it"
    yield f"  limit of stability: {limit.rule}; at the last checkpoint {limit.optimizer}; {steps}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if math.isfinite(value) else str(value)
