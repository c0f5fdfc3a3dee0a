"""The command ``sweep``: run the trials, print each as it ends, and the best."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Literal

from stabletrain.cli.summary import PrintingReporter, exit_code
from stabletrain.config.search_space import parse_space
from stabletrain.errors import UserError
from stabletrain.launch.launcher import LaunchRequest
from stabletrain.launch.search import FinishedTrial, Search, SearchOptions, prepare_search
from stabletrain.launch.study import Goal


def goal_of(minimise: str | None, maximise: str | None) -> Goal:
    """Return the goal that the options name.

    Args:
        minimise: the metric of ``--minimise``.
        maximise: the metric of ``--maximise``.

    Raises:
        UserError: unless exactly one is given.
    """
    if (minimise is None) == (maximise is None):
        raise UserError("sweep: expected one objective, --minimise METRIC or --maximise METRIC, such as val/loss")
    direction: Literal["minimize", "maximize"] = "minimize" if maximise is None else "maximize"
    return Goal(metric=str(maximise if minimise is None else minimise), direction=direction)


def search(
    request: LaunchRequest,
    over: Sequence[str],
    goal: Goal,
    *,
    trials: int,
    at_once: int,
    study: str | None,
    storage: str | None,
    prune: bool,
) -> int:
    """Run a sweep, print what came of it, and return the exit code.

    Args:
        request: recipe and overrides.
        over: the options ``--over``.
        goal: what is looked for.
        trials: how many to run.
        at_once: how many at a time.
        study: name of the study.
        storage: database of the studies.
        prune: whether trials may be stopped.
    """
    options = SearchOptions(
        space=parse_space(over), goal=goal, trials=trials, at_once=at_once, study=study, storage=storage, prune=prune
    )
    prepared = prepare_search(request, options)
    before = len(prepared.study.trials)
    if before:
        abandoned = f", {prepared.study.abandoned} of them left by a killed sweep" if prepared.study.abandoned else ""
        print(f"going on with study {prepared.study.name}: {before} trials{abandoned}", flush=True)
    finished = prepared.run(PrintingReporter(), lambda trial: print(_line(trial, goal), flush=True))
    print("\n".join(_summary(prepared)), flush=True)
    signals = [job for job in finished if job.result and job.result.end in ("interrupted", "terminated")]
    if signals:
        return exit_code(signals)
    return 0 if any(trial.state == "complete" for trial in prepared.finished) else exit_code(finished) or 1


def _line(trial: FinishedTrial, goal: Goal) -> str:
    what = f"{goal.metric} {trial.value:.5g}" if trial.value is not None else f"{trial.state}: {trial.why}"
    return f"trial {trial.job.number}: {trial.shown}  {what}"


def _summary(search: Search) -> list[str]:
    goal, study = search.options.goal, search.study
    complete = [each for each in study.trials if each.value is not None and each.state.name == "COMPLETE"]
    states = [each.state.name for each in study.trials]
    words = {"COMPLETE": "complete", "PRUNED": "diverged or pruned", "FAIL": "failed", "RUNNING": "running elsewhere"}
    counts = ", ".join(f"{states.count(state)} {word}" for state, word in words.items() if states.count(state))
    lines = ["", f"study:  {study.name} in {study.address}: {counts}"]
    if not complete:
        return [*lines, f"best:   none, since no trial has ended with a {goal.metric}"]
    sign = 1 if goal.direction == "minimize" else -1
    best = min(complete, key=lambda each: sign * (each.value or 0.0))
    values = [f"{each.key}={each.text(best.params[each.key])}" for each in search.options.space]
    trust = [f"--trust={package}" for package in search.request.trust]
    fixed = [word for word in search.request.overrides if not word.startswith("run_dir=")]
    lines.append(f"best:   trial {best.number}, {goal.metric} {best.value:.5g}: {' '.join(values)}")
    return [*lines, f"next:   {shlex.join(['stabletrain', 'train', search.recipe, *trust, *fixed, *values])}"]
