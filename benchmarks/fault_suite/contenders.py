"""Who protects the run: nothing, what others published, our single plugins, our stacks."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import SpikeDetection

import stabletrain as st

Callbacks = list[L.Callback]


class ZClipRestated(L.Callback):
    """ZClip by its paper's rule and published defaults (arXiv 2504.02507), written anew for this comparison.

    A norm more than ``z`` standard deviations above an exponential mean is brought to ``mean + (z std)^2 / (norm -
    mean)``; what was clipped enters the statistics as clipped. A fixed maximum of 1 comes on top, and from the start.
    """

    z, alpha, warmup_steps, max_norm = 2.5, 0.97, 25, 1.0

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads))
        held = norm
        if len(self.first) < self.warmup_steps:
            self.first.append(norm)
            if len(self.first) == self.warmup_steps:
                self.mean, self.variance = statistics.fmean(self.first), statistics.pvariance(self.first)
        else:
            if norm - self.mean > self.z * math.sqrt(self.variance):
                held = self.mean + self.z**2 * self.variance / (norm - self.mean)
            self.mean += (1 - self.alpha) * (held - self.mean)
            self.variance += (1 - self.alpha) * ((held - self.mean) ** 2 - self.variance)
        held = min(held, self.max_norm)
        if held < norm:
            for g in grads:
                g.mul_(held / norm)


@dataclass(frozen=True)
class Contender:
    """A way to protect a run.

    Args:
        name: as the table has it.
        build: fresh callbacks.
        clip: gradient_clip_val of the Trainer; None: none.
        note: what the name does not say.
    """

    name: str
    build: Callable[[], Callbacks] = list
    clip: float | None = None
    note: str = ""


def default_stack(**choices: str) -> Callbacks:
    """The default callbacks, without their schedule: every contender trains with the same one."""
    return st.default_callbacks(schedule="none", **choices)


def lightning_spikes() -> Callbacks:
    """Lightning's own detector; its list of batches goes to a folder that nobody reads."""
    folder = Path(tempfile.gettempdir()) / "fault_suite_skip_batches.json"
    return [SpikeDetection(exclude_batches_path=str(folder))]


CONTENDERS = (
    Contender("nothing", note="AdamW with the schedule that all contenders share"),
    Contender("clip 1.0", clip=1.0, note="Lightning's own `gradient_clip_val=1.0`"),
    Contender("ZClip", lambda: [ZClipRestated()], note="restated from its paper's rule and defaults, arXiv 2504.02507"),
    Contender(
        "6-sigma skip",
        lambda: [st.SkipOutliers.olmo()],
        note="OLMo-core's rule as our `SkipOutliers.olmo()` has it: mean + 6 standard deviations of 128 steps",
    ),
    Contender("SpikeDetection", lightning_spikes, note="Lightning's own; it raises, so no run survives a detection"),
    Contender("ClipZScore", lambda: [st.ClipZScore()]),
    Contender("SkipNonFinite", lambda: [st.SkipNonFinite()]),
    Contender("SkipOutliers", lambda: [st.SkipOutliers()]),
    Contender("Rollback", lambda: [st.Rollback()], note="alone"),
    Contender(
        "without Rollback", lambda: default_stack(spike="none"), note='`stabletrain.default_callbacks(spike="none")`'
    ),
    Contender("default stack", default_stack, note="`stabletrain.default_callbacks()`, as in conf/train.yaml"),
)
NOTHING, DEFAULT = "nothing", "default stack"
OURS = ("ClipZScore", "SkipNonFinite", "SkipOutliers", "Rollback", "without Rollback", DEFAULT)
