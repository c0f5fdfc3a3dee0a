"""Run a recorded run again, and check whether every attempted step has the same bits.

A run that was resumed is repeated segment by segment: each one ends at the step from which the next one was resumed,
with a checkpoint of its own. A run that was stopped is repeated up to there.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError
from stabletrain.launch import run_again
from stabletrain.launch.bounded import one_message, read_json
from stabletrain.launch.earlier_steps import read_resumes
from stabletrain.launch.launcher import FinishedJob, Job, LaunchRequest, Reporter
from stabletrain.launch.launcher import run as launch
from stabletrain.launch.original import Restore, restore_commands
from stabletrain.launch.recorded_run import RecordedRun, find_run
from stabletrain.launch.result import read_result
from stabletrain.launch.segments import Segment, segments_of
from stabletrain.runtime.records.run_files import RESUMED, STEPS
from stabletrain.runtime.records.steps_file import Steps, read_steps
from stabletrain.tracking.same_run import SameSteps, compare_steps
from stabletrain.tracking.what_differs import Differences, Imported, Record, what_differs

TAG = "reproduces"
CHANGED_TAG = "reproduces.changed"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One segment of the original, and how much of it is repeated.

    Args:
        segment: of the original.
        begin: its first step.
        end: the step after its last one; None: its own end.
        limit: attempted steps after which its repeat is ended; None: at its own end.
        has_next: whether another segment is resumed from its end.
        resume: a checkpoint of this machine from which it starts; None: from the end of the part before, or anew.
    """

    segment: Segment
    begin: int = 0
    end: int | None = None
    limit: int | None = None
    has_next: bool = False
    resume: str | None = None


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The check of one part.

    Args:
        same: the comparison of the steps.
        differences: between what the two have recorded of themselves.
        undetermined: operators without a deterministic implementation, as torch has warned in the repeat.
        end: how the repeat has ended, as text.
    """

    same: SameSteps
    differences: Differences
    undetermined: tuple[str, ...] = ()
    end: str = ""


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A repeated part.

    Args:
        part: what was repeated.
        job: its run.
        checked: the comparison; None without a check.
    """

    part: Part
    job: FinishedJob = field(repr=False)
    checked: Checked | None = None


class ReproduceReporter(Reporter):
    """Called during `reproduce`; this base class does nothing."""

    def begins(self, run: RecordedRun, parts: Sequence[Part]) -> None:
        """Called before the first part starts."""

    def restore(self, commands: Sequence[Restore]) -> None:
        """Called when a part starts, with the commands that would restore what the original ran with."""

    def ended(self, repeat: Repeat, number: int, count: int) -> None:
        """Called after each part; ``number`` counts from 1 to ``count``."""


def reproduce(
    wanted: str,
    report: ReproduceReporter,
    *,
    check: bool = False,
    steps: int | None = None,
    changes: Sequence[str] = (),
    trust: Sequence[str] = (),
) -> list[Repeat]:
    """Run a recorded run again, in a new folder.

    Args:
        wanted: id, prefix of an id, name or folder of the run.
        report: called on the way.
        check: whether to run without tracking and compare every attempted step; else the repeat is a new run in the
            store, with the tag ``reproduces``.
        steps: attempted steps after which it is ended, counted from the original's first one; None: all.
        changes: ``KEY=VALUE`` to change in its config.
        trust: packages from which the config may build objects; those that it names itself are not trusted.

    Returns:
        The parts that were run: until the end, the first difference, or a part that could not be run to its end.

    Raises:
        UserError: if there is no such run, if it cannot be run again or checked, or if its config has mistakes.
        StartFailed: if the user's own code fails before training.
        StartInterrupted: if Ctrl-C or SIGTERM arrived before training.
    """
    run = find_run(wanted, command="reproduce")
    if steps is not None and steps < 1:
        raise UserError(f"reproduce: --steps: expected at least 1, got {steps}")
    parts = plan(run, check=check, steps=steps)
    configs = [_config(part, check, changes) for part in parts]
    if (check or len(parts) > 1) and any(_kind(config) == "slurm" for config in configs):
        raise UserError(
            f"reproduce: {_named(run)} was a SLURM job, for whose end this command does not wait; inside an allocation "
            "add launch.kind=torchrun, or run it again without --check"
        )
    tags = {TAG: run.run_id or run.name} | ({CHANGED_TAG: " ".join(changes)} if changes else {})
    options = [*(["--check"] if check else []), *(["--steps", str(steps)] if steps is not None else [])]
    command = ["stabletrain", "reproduce", wanted, *changes, *options, *(w for t in trust for w in ("--trust", t))]

    def job(part: Part, config: dict[str, Any], resume: str | None) -> Job:
        choices = part.segment.config.get("choices")
        return run_again.job_of(config, choices, changes, tags=tags, command=command, resume=part.resume or resume)

    for part, config in zip(parts, configs, strict=True):
        job(part, config, None)  # so that every mistake is found before the first part runs
    report.begins(run, parts)
    record = parts[-1].segment.steps() if check else None
    done: list[Repeat] = []
    resume: str | None = None
    for number, (part, config) in enumerate(zip(parts, configs, strict=True), start=1):
        request = LaunchRequest(recipe=None, trust=tuple(trust))
        (finished,) = launch(request, [job(part, config, resume)], _Starting(report, part.segment))
        repeat = Repeat(part=part, job=finished, checked=_check(part, finished, record) if check else None)
        done.append(repeat)
        report.ended(repeat, number, len(parts))
        if repeat.checked is not None and repeat.checked.same.verdict != "identical":
            break
        if part.has_next:
            if finished.result is None or finished.result.end != "finished" or not finished.result.checkpoint:
                break
            resume = finished.result.checkpoint
            _same_run(configs, finished)
    return done


def plan(run: RecordedRun, *, check: bool, steps: int | None) -> list[Part]:
    """Return what has to be run, in order.

    Args:
        run: the original.
        check: see `reproduce`.
        steps: see `reproduce`.

    Raises:
        UserError: if the run has no run.yaml, or lacks what this needs.
    """
    segments = segments_of(run, command="reproduce")
    if not segments:
        raise UserError(f"reproduce: {_named(run)} has no run.yaml{_why_none(run)}")
    last = segments[-1]
    record = last.steps()
    if check and record is None:
        raise UserError(
            f"reproduce: --check: {_named(run)} cannot be checked: it has no {STEPS}, the exact record of every step "
            "that runs of stabletrain train write; without --check it can be run again"
        )
    known = last.resumes()
    before_last = len(known) - len(segments)
    began = [
        0 if segment.resumed_from is None else known[before_last + index] if before_last + index >= 0 else None
        for index, segment in enumerate(segments)
    ]
    # the first part whose own beginning is not in the record starts from the checkpoint of the original
    first = max((index for index, at in enumerate(began) if at is None), default=0)
    resume = None if segments[first].resumed_from is None else _require_checkpoint(segments[first], run)
    parts = [
        Part(segment=segment, begin=begin or 0, end=end, has_next=end is not None)
        for segment, begin, end in zip(segments[first:], began[first:], [*began[first + 1 :], None], strict=True)
    ]
    parts[0] = replace(parts[0], resume=resume)
    if steps is not None:
        parts = [part for part in parts if part.begin < steps] or parts[:1]
        if parts[-1].end is None or parts[-1].end >= steps:
            parts[-1] = replace(parts[-1], end=steps, has_next=False)
    for index, part in enumerate(parts):
        ends = [part.end, run_again.own_end(part.segment.config)]
        if check and not part.has_next:
            ends.append(_limit(part.segment, record))
        parts[index] = replace(part, limit=min((each for each in ends if each is not None), default=None))
    return parts


def _limit(segment: Segment, record: Steps | None) -> int | None:
    """Where the repeat of the last part is ended; None: at its own end, as the original's."""
    folder = segment.folder
    result = None if folder is None else read_result(folder)
    end = result.end if result is not None else {"FINISHED": "finished", "FAILED": "failed"}.get(segment.run.status)
    if end == "finished" or record is None:
        return None
    last = int(record.step[-1]) + 1
    return last + 1 if end in ("failed", "stopped") else last  # what ended it may be in the step after the last one


def _require_checkpoint(segment: Segment, run: RecordedRun) -> str:
    path = segment.resumed_from
    if path is None or not path.exists():
        raise UserError(
            f"reproduce: {_named(run)} was resumed from {path}, which is not here, and the run that wrote it, or "
            "the step, is not known; make the checkpoint available there, or name a run that began with new weights"
        )
    return str(path)


def _config(part: Part, check: bool, changes: Sequence[str]) -> dict[str, Any]:
    run = part.segment.run
    config = run_again.same_config(part.segment.config, _named(run))
    run_again.changed(config, changes)
    config["logger"] = run_again.fresh_logger(config, run.experiment, tracked=not check)
    if not isinstance(config["callbacks"], dict):
        return config  # a mistake that is reported with the others
    run_again.add_end(config, part.limit, save=part.has_next)
    if check:
        run_again.add_record(config)
    return config


def _kind(config: Mapping[str, Any]) -> object:
    launch = config["launch"]
    return launch.get("kind") if isinstance(launch, Mapping) else None


def _same_run(configs: Sequence[dict[str, Any]], finished: FinishedJob) -> None:
    """Let the parts that follow be logged to the run of the first one."""
    logger = finished.config.get("logger") or {}
    for config in configs:
        if logger.get("run_id") and config["logger"]:
            config["logger"]["run_id"] = logger["run_id"]


class _Starting(Reporter):
    def __init__(self, report: ReproduceReporter, segment: Segment) -> None:
        self._report, self._segment = report, segment

    def starting(self, config: dict[str, Any], number: int | None) -> None:
        """Tell what would restore the original's packages and code."""
        self._report.starting(config, number)
        commands = restore_commands(self._segment, Path(config["run_dir"]), Path.cwd())
        if commands:
            self._report.restore(commands)


def _check(part: Part, finished: FinishedJob, then: Steps | None) -> Checked:
    folder = Path(finished.config["run_dir"])
    now = None
    with suppress(OSError):
        now = read_steps(folder / STEPS)
    if then is None or now is None:
        same = SameSteps(compared=0)
    else:
        # the steps before are those of the checkpoint's run
        resumed = read_resumes(folder / RESUMED)[-1:] if part.resume is not None else []
        has_begun = part.resume is None or bool(resumed)  # else its record is the one that it was to begin with
        begin = max([part.begin, *resumed])
        same = compare_steps(then, now, begin=begin, end=part.end) if has_begun else SameSteps(compared=0)
    here = _record(finished.config, lambda name: _json(folder / name))
    original = _record(part.segment.config, part.segment.json)
    result = finished.result
    end = "" if result is None else f"{result.end}: {result.message}"
    modules, undetermined = run_again.repeat_record(folder)
    imported = None if modules is None else Imported(frozenset(modules), importlib.metadata.packages_distributions())
    return Checked(
        same=same,
        differences=what_differs(original, here, imported),
        undetermined=tuple(undetermined),
        end=end,
    )


def _record(config: Any, read: Callable[[str], Any]) -> Record:
    computed = run_again.same_config(config, "")
    del computed["logger"]
    for name in (run_again.END, run_again.REPEAT):
        computed["callbacks"].pop(name, None)
    files = {name: read(f"environment/{name}.json") for name in ("environment", "code", "data", "git")}
    return Record(config=computed, **files)


def _json(path: Path) -> Any:
    with suppress(OSError, ValueError):
        content = read_json(path)
        return content if isinstance(content, dict) else None
    return None


def _named(run: RecordedRun) -> str:
    return f"the run {one_message(run.name, 200)}" + (f" ({run.run_id[:8]})" if run.run_id else "")


def _why_none(run: RecordedRun) -> str:
    if run.tags.get("stabletrain.sweep"):
        return ": it is the parent of a sweep; name one of its jobs"
    source = one_message(run.tags.get("mlflow.source.name", ""), 200)
    made = f" (its source: {source})" if source else ""
    return f": it was not started by stabletrain train{made}, so it is not known how to run it again"
