"""Which samples a dropped step had, and the sentence at the end of a run that dropped many steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from stabletrain.core.events import Event, EventKind
from stabletrain.runtime.data.tape import sample_names
from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.metrics import Counters
from stabletrain.runtime.ranks import Ranks

_MAX_IN_EVENT = 1000
"""Maximum number of samples in an event."""
_NAMED_KINDS: tuple[EventKind, ...] = ("skip", "nonfinite")
"""The events that name the samples of a dropped step."""
_SHARE, _AT_LEAST = 0.01, 100
"""Share of dropped steps, and number of attempted ones, from which on a run ends with a warning."""
_MOST_FREQUENT = 5
"""Number of samples in that warning."""


class DroppedStep(NamedTuple):
    """A step that a rule dropped.

    Args:
        step: number of the attempted step, from 0.
        samples: of all ranks, each once; empty if they are unknown.
    """

    step: int
    samples: tuple[int | str, ...]

    def describe(self, event: Event) -> Event:
        """The event, with the samples if it reports that this step was dropped."""
        if event.step != self.step or event.kind not in _NAMED_KINDS:
            return event
        more = max(0, len(self.samples) - _MAX_IN_EVENT)
        return event._replace(samples=self.samples[:_MAX_IN_EVENT], more_samples=more)


class StepSamples:
    """The samples of the micro-batches of a step.

    They are known if a plugin has wrapped the train loader (`TrainLoader`) and the loader has a sampler. A step that is
    applied costs a reference to its lists of indices.

    Args:
        trainer: in a fit.
        ranks: of the fit.
    """

    def __init__(self, trainer: Trainer, ranks: Ranks) -> None:
        self._ranks = ranks
        self._loader = TrainLoader.find(trainer)
        self._window: list[Any] = []
        self._step: list[Any] = []

    def add_batch(self) -> None:
        """A micro-batch of the window in progress has a loss."""
        if self._loader is not None:
            self._window.append(self._loader.current_samples)

    def end_window(self) -> None:
        """The step is decided: the next micro-batch starts a new window."""
        self._step, self._window = self._window, []

    def clear(self) -> None:
        """Remove the micro-batches of the window in progress."""
        self._window = []

    def of_step(self, alone: bool) -> tuple[int | str, ...]:
        """The samples of the last step, each once. A collective, unless ``alone`` or unknown to all ranks.

        Args:
            alone: return this rank's samples only: not all ranks call it.
        """
        mine = [name for samples in self._step for name in sample_names(samples)]
        if self._loader is None:
            return ()
        everyone = [mine] if alone else self._ranks.gather(mine)
        return tuple(dict.fromkeys(name for names in everyone for name in names))


def summary(counters: Counters, events: Path | None) -> str:
    """The sentence at the end of a fit: what became of the run's steps.

    Args:
        counters: of the run.
        events: file with the events; None: there were none.
    """
    counts = f"{counters.applied} applied, {counters.skipped} skipped, {counters.clipped} clipped"
    if counters.overflows:
        counts += f", {counters.overflows} fp16 overflows"
    rollbacks = f"{counters.rollbacks} rollback{'' if counters.rollbacks == 1 else 's'}"
    where = "no events" if events is None else f"events: {events}"
    return f"{counters.attempted} steps: {counts}; {rollbacks}; {where}"


def warning(counters: Counters, keys: Mapping[str, str]) -> str | None:
    """The sentence at the end of a run that dropped more than 1 % of at least 100 attempted steps; else None.

    Steps that a rollback undid count as attempted, and as dropped if they were. Steps without a loss are not
    counted as dropped: the module has decided that.

    Args:
        counters: of the run.
        keys: config keys of the plugins that may drop steps, by name.
    """
    attempted, dropped = counters.attempted, counters.skipped - counters.without_loss
    if attempted < _AT_LEAST or dropped <= _SHARE * attempted:
        return None
    text = f"{dropped} of {attempted} attempted steps ({dropped / attempted:.1%}) were dropped"
    advice = "loosen the limits"
    if counters.dropped_by:
        plugin, count = max(counters.dropped_by.items(), key=lambda each: each[1])
        text += f", {count} of them by {plugin}"
        key = f" (config key {keys[plugin]})" if plugin in keys else ""
        advice = f"loosen the limits of {plugin}{key}, or remove it"
    if not counters.dropped_samples:
        return f"{text}. Look at the data of these steps (events.jsonl has the reasons). If they are right, {advice}"
    ranked = sorted(counters.dropped_samples.items(), key=lambda each: -each[1])[:_MOST_FREQUENT]
    often = ", ".join(f"{sample} ({count} times)" for sample, count in ranked if count > 1)
    text += f". Samples that were in them most often: {often}" if often else ". No sample was in two of them"
    return (
        f"{text}. Look at the samples of these steps (events.jsonl names them): if they are wrong, remove them from "
        f"the data; if they are right, {advice}"
    )
