"""One rollback, with everything that is needed to make it again in a replay."""

from __future__ import annotations

from typing import Any, NamedTuple


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
    """

    step: int
    to: int | None
    checkpoint: str | None
    applied: tuple[int, int]
    excluded: tuple[tuple[Any, ...], ...]
    samples: tuple[tuple[Any, ...], ...]
    rewarm: int
    baselines: str
    plugin: str
    cause: str

    @property
    def undone(self) -> int:
        """Attempted steps that it undid; with a checkpoint, applied steps."""
        return self.applied[0] - self.applied[1] if self.to is None else self.step - self.to

    @property
    def target(self) -> str:
        """The state that was restored, for messages."""
        if self.checkpoint is None:
            return f"the snapshot of step {self.applied[1]}"
        return f"{self.checkpoint} (step {self.applied[1]}; the data position is not restored)"

    @property
    def summary(self) -> str:
        """One sentence, for the event."""
        excluded = f", {len(self.excluded)} batches excluded" if self.excluded else ""
        return f"back to {self.target} from step {self.applied[0]}{excluded}: {self.plugin}: {self.cause}"
