"""A rollback or an accepted level, with everything that is needed to repeat it in a replay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Identity = tuple[Any, ...]
"""Of a batch, as for `TrainLoader.exclude`."""


class Intervention(NamedTuple):
    """A rollback; its fields are the keys of a line in ``interventions.jsonl``.

    Args:
        step: attempted steps when it was made.
        to: attempted steps of the snapshot that was restored; None: a checkpoint was restored.
        checkpoint: path of that checkpoint; None: a snapshot was restored.
        applied: applied steps before and after.
        excluded: identities of the excluded batches, as for `TrainLoader.exclude`.
        samples: the same batches by their samples on rank 0, as information in the log; empty with one process.
        rewarm: length of the second warm-up, in applied steps; 0: none.
        baselines: the rules' histories after it: ``"restore"`` (as restored) or ``"reset"`` (empty).
        plugin: the plugin that requested it.
        cause: the reason of that request.
        rewound: whether the data position of the snapshot was restored; with a checkpoint it is not.
        incident: applied steps before the incident it was made for; None: it cannot be a change that is meant.
        excess: of the loss in that incident over the usual one; None: unknown.
        repeats: whether the same steps are made again, since neither data nor learning rate were the cause (see
            `Request.good_at`): no batch is excluded, and the rules' histories are those of the snapshot.
    """

    step: int
    to: int | None
    checkpoint: str | None
    applied: tuple[int, int]
    excluded: tuple[Identity, ...]
    samples: tuple[Identity, ...]
    rewarm: int
    baselines: str
    plugin: str
    cause: str
    rewound: bool = True
    incident: int | None = None
    excess: float | None = None
    repeats: bool = False

    @property
    def undone(self) -> int:
        """Attempted steps that it undid; with a checkpoint, applied steps."""
        return self.applied[0] - self.applied[1] if self.to is None else self.step - self.to

    @property
    def target(self) -> str:
        """The state that was restored, for messages."""
        name = "the snapshot of step" if self.checkpoint is None else f"{self.checkpoint}, step"
        left = "" if self.rewound else " (the data position is not restored)"
        return f"{name} {self.applied[1]}{left}"

    @property
    def summary(self) -> str:
        """One sentence, for the event."""
        excluded = f", {len(self.excluded)} batches excluded" if self.excluded else ""
        return f"back to {self.target} from step {self.applied[0]}{excluded}: {self.plugin}: {self.cause}"


class AcceptedLevel(NamedTuple):
    """A level of the loss that was accepted as meant; its fields are the keys of a line in ``interventions.jsonl``.

    Args:
        step: attempted steps when it was accepted.
        applied: applied steps then.
        given_back: identities of the batches that are no longer excluded.
        losses: the losses from which all rules learned the level.
        norms: the gradient norms of the same steps.
        rewarm: length of the second warm-up, in applied steps; 0: none.
        level: median of the losses.
        was: the usual loss before.
        cause: the request for a rollback that was answered by it.
    """

    step: int
    applied: int
    given_back: tuple[Identity, ...]
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    rewarm: int
    level: float
    was: float
    cause: str

    @property
    def summary(self) -> str:
        """One sentence, for the event."""
        back = f", and {len(self.given_back)} excluded batches are used again" if self.given_back else ""
        return (
            f"the loss is at {self.level:.4g} instead of {self.was:.4g} although the run was rolled back: this is "
            f"taken for a change by design, and all rules learn the new level{back}. If it is one, announce it next "
            "time (stabletrain.announce, or plugins.spike.expect); if it is an error, never accept a level "
            f"(plugins.spike.accept=null). It answers the request of {self.cause}"
        )


def excluded_batches(made: Iterable[Intervention | AcceptedLevel]) -> frozenset[Identity]:
    """The batches that are excluded after these interventions."""
    excluded: set[Identity] = set()
    for each in sorted(made, key=lambda one: one.step):
        if isinstance(each, AcceptedLevel):
            excluded.difference_update(each.given_back)
        else:
            excluded.update(each.excluded)
    return frozenset(excluded)
