"""The words of a sweep's run: its name, the metric that is compared, and the description with a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabletrain.core import metric_names
from stabletrain.launch.result import Result

_MOST_VALUES = 8
"""Values of one key in the name of a sweep."""
_MOST_ROWS = 50
"""Rows in a description."""
_LOSSES = ("val/loss", "val_loss", "valid/loss", "valid_loss", "validation/loss", "validation_loss")
"""Names of the objective that are looked for first."""
_LAST = ("train/loss", "train_loss", "loss", "stability/loss")
"""Names that are looked for if nothing was validated."""


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One job that has ended.

    Args:
        number: in the sweep.
        recipe: its name.
        name: what distinguishes it.
        run_id: its run in MLflow; None if none was opened.
        result: how it ended; None: it was submitted to SLURM.
        objective: name of the metric that the config asks for; None: the loss.
    """

    number: int
    recipe: str
    name: str
    run_id: str | None
    result: Result | None
    objective: str | None = None

    @property
    def end(self) -> str:
        """How it ended, as one word."""
        return "submitted" if self.result is None else self.result.end

    @property
    def failed(self) -> bool:
        """Whether it ended, but not as planned."""
        return self.end not in ("finished", "submitted")


def sweep_name(recipes: Sequence[str], overrides: Sequence[Sequence[str]]) -> str:
    """Return the name of a sweep: its recipes, and the values of what varies.

    Args:
        recipes: of the jobs.
        overrides: of each job, as many for each.

    >>> jobs = [[f"plugins/clip={c}", f"seed={s}", "trainer.max_steps=5"] for c in ("none", "zscore") for s in (0, 1)]
    >>> sweep_name(["char_gpt"] * 4, jobs)
    'char_gpt: clip=none,zscore × seed=0,1'
    >>> sweep_name(["a", "b"], [[], []])
    'a,b'
    """
    axes = []
    for words in zip(*overrides, strict=True):
        different = list(dict.fromkeys(words))
        if len(different) > 1:
            key = words[0].partition("=")[0].lstrip("+").removeprefix("plugins/")
            axes.append(f"{key}={_shortened([word.partition('=')[2] for word in different])}")
    names = _shortened(list(dict.fromkeys(recipes)))
    return f"{names}: {' × '.join(axes)}" if axes else names


def _shortened(values: Sequence[str]) -> str:
    if len(values) <= _MOST_VALUES:
        return ",".join(values)
    return f"{','.join(values[: _MOST_VALUES - 2])},...,{values[-1]} ({len(values)} values)"


def objective_of(metrics: Mapping[str, Any], wanted: str | None = None) -> str | None:
    """Return the name of the metric by which runs are compared; None if there is none.

    Args:
        metrics: of a run, by name.
        wanted: the metric that the config names; None: the loss on held-out data, or else that of the training.

    >>> objective_of({"val/accuracy": 0.9, "val/loss": 0.1, "stability/loss": 0.2}), objective_of({"loss": 1.0})
    ('val/loss', 'loss')
    >>> objective_of({"val/loss": 0.1, "val/accuracy": 0.9}, "val/accuracy"), objective_of({}, "val/accuracy")
    ('val/accuracy', None)
    """
    if wanted is not None:
        return wanted if metric_names.find(wanted, metrics) is not None else None
    of_validation = sorted(name for name in metrics if name.startswith("val") and name.endswith("loss"))
    return next((name for name in (*_LOSSES, *of_validation, *_LAST) if name in metrics), None)


def head(command: str, count: int) -> str:
    """Return the beginning of the description, in Markdown.

    Args:
        command: the command line.
        count: of the jobs.
    """
    return f"{count} run{'s' if count > 1 else ''} of one sweep:\n\n    {command}\n"


def table(jobs: Sequence[SweepJob], values: Sequence[float], objective: str, artifact: str) -> Iterator[str]:
    """Yield the lines of a table in Markdown: how each job ended, and its objective.

    Args:
        jobs: that have ended.
        values: of the objective, for each job; NaN of one that failed.
        objective: its name.
        artifact: name of the file that has all of them.
    """
    yield f"| job | | end | steps | {objective} |"
    yield "|---|---|---|---|---|"
    for job, value in list(zip(jobs, values, strict=True))[:_MOST_ROWS]:
        shown = "-" if job.failed or job.result is None else f"{value:.6g}"
        steps = 0 if job.result is None else job.result.steps
        yield f"| {job.number} | {job.name.replace('|', ' ')} | {job.end} | {steps} | {shown} |"
    if len(jobs) > _MOST_ROWS:
        yield f"\n{len(jobs) - _MOST_ROWS} more jobs are in {artifact}, among the artifacts."
