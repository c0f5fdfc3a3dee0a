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
        needs: public names without which it cannot run.
        options: Trainer arguments.
        note: what the name does not say.
    """

    name: str
    build: Callable[[], Callbacks] = list
    needs: tuple[str, ...] = ()
    clip: float | None = None
    note: str = ""

    def is_there(self) -> bool:
        """Whether everything it needs can be imported."""
        try:
            return all(callable(getattr(st, name)) for name in self.needs)
        except (AttributeError, ImportError):
            return False


def default_stack() -> Callbacks:
    """The default callbacks, without their schedule: every contender trains with the same one."""
    return [each for each in st.default_callbacks() if not isinstance(each, st.ScheduleLR)]


def with_rollback() -> Callbacks:
    """The default callbacks and a rollback, unless they have one already."""
    stack = default_stack()
    if not any(isinstance(each, st.Rollback) for each in stack):
        stack.append(st.Rollback())
    return stack


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
        ("SkipOutliers",),
        note="OLMo-core's rule as our `SkipOutliers.olmo()` has it: mean + 6 standard deviations of 128 steps",
    ),
    Contender("SpikeDetection", lightning_spikes, note="Lightning's own; it raises, so no run survives a detection"),
    Contender("ClipZScore", lambda: [st.ClipZScore()], ("ClipZScore",)),
    Contender("SkipNonFinite", lambda: [st.SkipNonFinite()], ("SkipNonFinite",)),
    Contender("SkipOutliers", lambda: [st.SkipOutliers()], ("SkipOutliers",)),
    Contender("Rollback", lambda: [st.Rollback()], ("Rollback",), note="alone"),
    Contender("default stack", default_stack, note="`stabletrain.default_callbacks()`"),
    Contender("default + Rollback", with_rollback, ("Rollback",)),
)
NOTHING, DEFAULT, DEFAULT_ROLLBACK = "nothing", "default stack", "default + Rollback"
OURS = ("ClipZScore", "SkipNonFinite", "SkipOutliers", "Rollback", DEFAULT, DEFAULT_ROLLBACK)
