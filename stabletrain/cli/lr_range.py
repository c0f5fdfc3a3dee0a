"""The command ``lr-range``: run the test, print the two rates, draw the curve."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator
from pathlib import Path

from stabletrain.cli.summary import PrintingReporter, exit_code
from stabletrain.errors import UserError
from stabletrain.launch.launcher import LaunchRequest, run
from stabletrain.launch.lr_range import RangeOptions, RangeRun, prepare_range, read_ranges
from stabletrain.runtime.records.writable import unwritable

_PLOT = "lr_range.png"


def run_range_test(request: LaunchRequest, options: RangeOptions, plot: Path | None) -> int:
    """Run a range test, print what it shows, and return the exit code.

    Args:
        request: recipe and overrides.
        options: of the test.
        plot: file of the plot; None: ``lr_range.png`` in the run's folder, if matplotlib is installed.

    Raises:
        UserError: if the test cannot be run.
    """
    from stabletrain.launch.lr_range_plot import draw_ranges

    if plot is not None and (reason := unwritable(str(plot), folder=False)):
        raise UserError(f"lr-range: --plot: {reason}; choose another file")
    jobs = prepare_range(request, options)
    finished = run(request, jobs, PrintingReporter())
    runs = read_ranges(jobs, finished)
    print("\n".join(line for each in runs for line in _lines(each, options)))
    found = [each for each in runs if each.points]
    if found and (plot is not None or importlib.util.find_spec("matplotlib") is not None):
        file = plot or found[0].folder / _PLOT
        draw_ranges(found, file)
        print(f"plot: {file}")
    if found:
        print(f"next: {next_command(request, found[0])}", flush=True)
    # a plugin that stops a range test has seen the same as the test: the rate was too high
    return exit_code([job for job in finished if job.result is None or job.result.end != "stopped" or not found])


def next_command(request: LaunchRequest, first: RangeRun) -> str:
    """Return the command that trains at the lower of the two rates.

    Args:
        request: recipe and overrides.
        first: the run whose rates count.
    """
    rates = [rate for rate in (first.result.steepest, first.result.below_turning) if rate is not None]
    has_rate = first.job.config["optimizer"] is not None
    rate = [f"optimizer.lr={min(rates):.2g}"] if rates and has_rate else []
    words = [word for word in request.command if not word.startswith(("optimizer.lr=", "run_dir="))]
    return shlex.join([*words, *rate])


def _lines(run: RangeRun, options: RangeOptions) -> Iterator[str]:
    found, result = run.result, run.job.result
    yield ""
    yield f"{run.title or run.job.recipe}: {len(run.points)} steps, in {run.folder}"
    if result is not None and result.end != "finished":
        yield f"  {result.end}: {result.message}"
    if not run.points:
        return
    if found.steepest is None:
        yield (
            "  the loss has not fallen by more than its noise between "
            f"{options.start:g} and {run.points[-1].rate:.3g}; try a higher --to, or more --steps"
        )
        return
    yield f"  steepest descent at             {found.steepest:.2g}"
    if found.turning is None:
        yield f"  the loss has not turned below   {run.points[-1].rate:.2g}; try a higher --to"
    else:
        yield f"  a tenth of where it turns       {found.below_turning:.2g}  (turns at {found.turning:.2g})"
