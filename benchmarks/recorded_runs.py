"""Made-up runs in a tracking store, recorded as the launcher, the guard and the MLflow logger record them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stabletrain.core.events import Event
from stabletrain.runtime.records.run_files import EVENTS, RUN_YAML, STEPS
from stabletrain.runtime.records.steps_file import Flag
from stabletrain.tracking.naming import chunks
from stabletrain.tracking.ownership import RUN_DIR
from stabletrain.tracking.runs import create_run, set_final_status, write_params

_RECORD = np.dtype([("loss", "<f8"), ("grad_norm", "<f8"), ("flags", "u1")])
EVERY = 10
"""Attempted steps for each point of the sampled metrics."""


class Run:
    """A run that falls from 4.3 to 1.8 with noise; what happens in it is set before it is recorded.

    Args:
        steps: attempted steps.
        seed: of the noise.
    """

    def __init__(self, steps: int, seed: int = 0) -> None:
        noise = np.random.default_rng(seed)
        at = np.arange(steps)
        self.loss = 1.8 + 2.5 * np.exp(-at / (steps / 7)) + noise.normal(0, 0.06, steps)
        self.grad_norm = np.exp(noise.normal(-1, 0.3, steps))
        self.lr = 5e-3 * (1 - at / steps)
        self.flags = np.full(steps, Flag.RECORDED.value, dtype=np.uint8)
        self.events: list[Event] = []
        self.metrics: dict[str, float] = {}
        """Last values of further metrics."""

    def skip(self, step: int, reason: str = "the loss is nan") -> None:
        """Drop a step whose loss is NaN."""
        self.loss[step] = self.grad_norm[step] = np.nan
        self.flags[step] |= Flag.SKIPPED.value
        self.events.append(Event(step, "skip_nonfinite", "skip", float("nan"), float("nan"), reason))

    def spike(self, step: int, length: int, height: float = 3.0) -> None:
        """Raise the loss for some steps, after which the run goes back."""
        self.loss[step : step + length] += height
        self.events.append(Event(step, "rollback", "spike", 4.9, 2.4, "loss 4.9 > 2.4"))
        text = f"loss 4.9 above 2.4 for {length} steps: back by 100 steps"
        self.events.append(Event(step + length, "rollback", "rollback", 4.9, 2.4, text))

    def clip(self, steps: Any) -> None:
        """Mark steps as clipped."""
        self.flags[steps] |= Flag.CLIPPED.value

    def record(
        self,
        uri: str,
        folder: Path,
        *,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        artifacts: bool = True,
    ) -> str:
        """Write the run to the store and to a folder of its own, and return its id.

        Args:
            uri: tracking URI of a store that is ready.
            folder: of the run, made here.
            experiment: its name.
            name: of the run.
            params: nested, the config.
            tags: further ones.
            artifacts: whether the files are in the store, too.
        """
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        run_id = create_run(uri, experiment, name=name, tags={RUN_DIR: str(folder), **(tags or {})})
        write_params(client, run_id, params)
        for part in chunks(self._points(), 1000):
            client.log_batch(run_id, metrics=part)
        folder.mkdir(parents=True)
        config = {**params, "logger": {"run_id": run_id, "tracking_uri": uri}}
        (folder / RUN_YAML).write_text(yaml.safe_dump(config))
        records = np.zeros(len(self.loss), _RECORD)
        records["loss"], records["grad_norm"], records["flags"] = self.loss, self.grad_norm, self.flags
        (folder / STEPS).write_bytes(records.tobytes())
        if self.events:
            (folder / EVENTS).write_text("".join(f"{event.to_json()}\n" for event in self.events))
        if artifacts:
            client.log_artifacts(run_id, str(folder))
        set_final_status(uri, run_id, "FINISHED")
        return run_id

    def _points(self) -> Iterator[Any]:
        from mlflow.entities import Metric

        for begin in range(0, len(self.loss), EVERY):
            part = slice(begin, begin + EVERY)
            step = min(begin + EVERY, len(self.loss)) - 1
            flags = self.flags[part]
            applied = (flags & Flag.SKIPPED.value) == 0
            values = {
                "stability/loss": self.loss[part][applied].mean() if applied.any() else np.nan,
                "stability/grad_norm": self.grad_norm[part][applied].mean() if applied.any() else np.nan,
                "stability/lr": self.lr[step],
                "stability/clipped_share": float(((flags & Flag.CLIPPED.value) != 0).mean()),
                "stability/skipped": float(((self.flags[: step + 1] & Flag.SKIPPED.value) != 0).sum()),
                "stability/spike_score": 0.0,
            }
            for key, value in values.items():
                if np.isfinite(value):
                    yield Metric(key, float(value), begin, step)
        rollbacks = sum(event.kind == "rollback" for event in self.events)
        for key, value in {"stability/rollbacks": float(rollbacks), **self.metrics}.items():
            yield Metric(key, value, len(self.loss), len(self.loss) - 1)
