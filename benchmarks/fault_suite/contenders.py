"""The compared protections: none, published methods, single plugins of stabletrain, and stacks of plugins."""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import SpikeDetection

import stabletrain as st
from fault_suite.peers import adamw_clip, arc_callback, stability_guard, zclip_callback
from fault_suite.trial import MakeOptimizer, adamw

Callbacks = list[L.Callback]


class ZClipRestated(L.Callback):
    """ZClip, reimplemented from the rule and the defaults in its paper (arXiv 2504.02507).

    A norm more than ``z`` standard deviations above an exponential moving mean is clipped to ``mean + (z std)^2 / (norm
    - mean)``; clipped norms enter the statistics. In addition, all norms are clipped to a fixed maximum of 1, also in
    the warm-up.
    """

    z, alpha, warmup_steps, max_norm = 2.5, 0.97, 25, 1.0

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads))
        clipped = norm
        if len(self.first) < self.warmup_steps:
            self.first.append(norm)
            if len(self.first) == self.warmup_steps:
                self.mean, self.variance = statistics.fmean(self.first), statistics.pvariance(self.first)
        else:
            if norm - self.mean > self.z * math.sqrt(self.variance):
                clipped = self.mean + self.z**2 * self.variance / (norm - self.mean)
            self.mean += (1 - self.alpha) * (clipped - self.mean)
            self.variance += (1 - self.alpha) * ((clipped - self.mean) ** 2 - self.variance)
        clipped = min(clipped, self.max_norm)
        if clipped < norm:
            for g in grads:
                g.mul_(clipped / norm)


@dataclass(frozen=True)
class Contender:
    """A method of protection in the comparison.

    Args:
        name: name in the table.
        build: makes new callbacks.
        clip: gradient_clip_val of the Trainer; None: no clipping.
        note: explanation for the result page.
        make_optimizer: makes the optimizer, for protections that are one.
        package: module that must be installed for it; "": none. Such a peer may set the learning rate and skip steps
            without Lightning's notice, so nothing else sets its rate after the warm-up, and its skips are not counted.
    """

    name: str
    build: Callable[[], Callbacks] = list
    clip: float | None = None
    note: str = ""
    make_optimizer: MakeOptimizer = adamw
    package: str = ""

    @property
    def is_peer(self) -> bool:
        """Whether this is the code of another project."""
        return bool(self.package)

    @property
    def is_installed(self) -> bool:
        """Whether the contender can be run here."""
        return not self.package or importlib.util.find_spec(self.package) is not None


def default_stack(**choices: str) -> Callbacks:
    """Return the default callbacks without a schedule, since all contenders train with the same schedule."""
    return st.default_callbacks(schedule="none", **choices)


def lightning_spikes() -> Callbacks:
    """Return Lightning's own detector; its list of excluded batches is written to a temporary file and not used."""
    folder = Path(tempfile.gettempdir()) / f"fault_suite_skip_batches_{os.getpid()}.json"
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
    Contender("ZClip, its own code", zclip_callback, note="`ZClipLightningCallback()` of zclip 1.0.0", package="zclip"),
    Contender("ARC", arc_callback, note="`LightningCallback()` of arc-training 5.2.0.post1", package="arc"),
    Contender(
        "stabilityguard",
        note='`GuardedOptimizer(nan_action="skip")` of stabilityguard 0.3.0 with its defaults',
        make_optimizer=stability_guard,
        package="stabilityguard",
    ),
    Contender(
        "AdamWClip",
        note="instead of AdamW, version 0.1.4 with its defaults",
        make_optimizer=adamw_clip,
        package="AdamWClip",
    ),
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
