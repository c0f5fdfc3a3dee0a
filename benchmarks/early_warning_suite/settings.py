"""What is trained: eight healthy settings that give the limits, eight others, and fourteen kinds of trouble."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from early_warning_suite.data import RandomTargets, Shift

STEPS = 300
"""Attempted steps of a run."""


@dataclass(frozen=True)
class Cosine:
    """A warm-up, and a cosine to a tenth: factor of the learning rate at a step."""

    warmup: int = 30

    def __call__(self, step: int) -> float:
        """The factor."""
        return min(1.0, (step + 1) / self.warmup) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))


@dataclass(frozen=True)
class Constant:
    """A warm-up, then constant; with a long warm-up the rate rises for most of the run."""

    warmup: int

    def __call__(self, step: int) -> float:
        """The factor."""
        return min(1.0, (step + 1) / self.warmup)


@dataclass(frozen=True)
class Creep:
    """From a step on, the rate grows by the same factor at each step.

    Args:
        factor: of the whole growth.
        start: first step of the growth.
        end: its last.
    """

    factor: float
    start: int = 120
    end: int = 280

    def __call__(self, step: int) -> float:
        """The factor."""
        share = min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))
        return min(1.0, (step + 1) / 30) * self.factor**share


@dataclass(frozen=True)
class Surge:
    """For some steps, the rate is much higher."""

    factor: float
    start: int = 150
    steps: int = 40

    def __call__(self, step: int) -> float:
        """The factor."""
        surges = self.start <= step < self.start + self.steps
        return min(1.0, (step + 1) / 30) * (self.factor if surges else 1.0)


@dataclass(frozen=True)
class Grow:
    """From a step on, weights of a ``gpt`` are multiplied before each step: a trouble that is injected.

    Args:
        what: ``qk`` (projections of queries and keys), ``head`` (output layer) or ``residual`` (what is added to the
            residual stream).
        factor: per step.
        start: first step.
    """

    what: str
    factor: float
    start: int = 120

    @torch.no_grad()
    def __call__(self, step: int, net: nn.Module) -> None:
        """Multiply the weights."""
        if step < self.start:
            return
        if self.what == "head":
            net.head.weight.mul_(self.factor)
            return
        for block in net.blocks:
            if self.what == "qk":
                rows = block.attention.qkv.out_features * 2 // 3
                block.attention.qkv.weight[:rows] *= self.factor
            else:
                block.attention.out.weight.mul_(self.factor)
                block.mlp[2].weight.mul_(self.factor)


Rate: TypeAlias = Cosine | Constant | Creep | Surge
Data: TypeAlias = Shift | RandomTargets


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A training.

    Args:
        name: in the record and the tables.
        model: kind of network, see `early_warning_suite.models.build`.
        lr: peak rate.
        adamw: AdamW, or else SGD with momentum 0.9.
        beta2: of AdamW.
        decay: weight decay.
        rate: factor of the rate.
        layers: of a ``gpt``.
        width: of a ``gpt``.
        qk_norm: of a ``gpt``.
        clip: largest gradient norm; None: not clipped.
        grow: weights that are made to grow.
        data: a fault of the data.
        fp16_logits: logits and loss are computed in float16.
        start: step at which the cause of the trouble begins; None: a healthy run.
    """

    name: str
    model: str = "gpt"
    lr: float
    adamw: bool = True
    beta2: float = 0.95
    decay: float = 0.1
    rate: Rate = Cosine()
    layers: int = 2
    width: int = 48
    qk_norm: bool = False
    clip: float | None = None
    grow: Grow | None = None
    data: Data | None = None
    fp16_logits: bool = False
    start: int | None = None

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that change with any argument but the name."""
        text = repr(self).replace(repr(self.name), "")
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _troubled(name: str, cause: Rate | Grow | Data, start: int, **others: object) -> Setting:
    place = "grow" if isinstance(cause, Grow) else "data" if isinstance(cause, Data) else "rate"
    return Setting(name=name, start=start, **{place: cause}, **others)  # type: ignore[arg-type]


SEEN: Sequence[Setting] = (
    Setting(name="gpt, rate 5e-3", lr=5e-3),
    Setting(name="gpt, rate 2e-3, beta2 0.999", lr=2e-3, beta2=0.999),
    Setting(name="gpt with qk-norm, rate 1e-2", lr=1e-2, qk_norm=True),
    Setting(name="gpt, constant rate 3e-3, no decay", lr=3e-3, decay=0.0, rate=Constant(30)),
    Setting(name="post-LN, rate 1e-3, warm-up 100", model="post-LN", lr=1e-3, rate=Constant(100)),
    Setting(name="LSTM, rate 5e-3", model="lstm", lr=5e-3, clip=1.0),
    Setting(name="gpt, 4 layers of 64, rate 3e-3", lr=3e-3, layers=4, width=64),
    Setting(name="batch-norm CNN, SGD 0.1", model="cnn", lr=0.1, adamw=False, decay=5e-4),
)
"""Healthy settings from which the fixed limits come; the false alarms of other seeds are counted on them."""

UNSEEN: Sequence[Setting] = (
    Setting(name="gpt, 3 layers of 96, rate 1e-2, no decay", lr=1e-2, layers=3, width=96, decay=0.0),
    Setting(name="gpt, SGD 0.5", lr=0.5, adamw=False, decay=0.0),
    Setting(name="batch-norm CNN, AdamW 1e-2", model="cnn", lr=1e-2),
    Setting(name="LSTM, rate 2e-2", model="lstm", lr=2e-2),
    Setting(name="post-LN, rate 3e-3, beta2 0.999", model="post-LN", lr=3e-3, beta2=0.999, rate=Constant(100)),
    Setting(name="ReLU RNN, SGD 0.3", model="rnn", lr=0.3, adamw=False, decay=0.0, rate=Constant(60)),
    Setting(name="gpt with qk-norm, constant rate 2e-2", lr=2e-2, qk_norm=True, rate=Constant(60)),
    Setting(name="gpt, rate 1.5e-2", lr=1.5e-2),
)
"""Healthy settings that play no part in the limits."""

TROUBLED: Sequence[Setting] = (
    _troubled("rate creeps x200, gpt, beta2 0.999", Creep(200.0), 120, lr=5e-3, beta2=0.999),
    _troubled("rate creeps x200, gpt, beta2 0.95", Creep(200.0), 120, lr=5e-3),
    _troubled("rate creeps x200, gpt with qk-norm", Creep(200.0), 120, lr=5e-3, qk_norm=True),
    _troubled("rate creeps x60, post-LN, beta2 0.999", Creep(60.0), 120, lr=1e-3, model="post-LN", beta2=0.999),
    _troubled("rate creeps x100, LSTM", Creep(100.0), 120, lr=5e-3, model="lstm"),
    _troubled("rate creeps x50, ReLU RNN, SGD", Creep(50.0), 120, lr=0.1, model="rnn", adamw=False, decay=0.0),
    _troubled(
        "rate creeps x1000, batch-norm CNN, SGD", Creep(1000.0), 120, lr=0.05, model="cnn", adamw=False, decay=5e-4
    ),
    _troubled("rate x30 for 40 steps, gpt", Surge(30.0), 150, lr=5e-3),
    _troubled("ten times too high a rate, post-LN, warm-up 250", Constant(250), 0, lr=5e-2, model="post-LN"),
    _troubled("query and key weights grow 8 % a step", Grow("qk", 1.08), 120, lr=5e-3),
    _troubled("head grows 3 % a step, fp16 logits", Grow("head", 1.03), 120, lr=5e-3, fp16_logits=True),
    _troubled("residual writers grow 8 % a step", Grow("residual", 1.08), 120, lr=5e-3),
    _troubled("characters exchanged over 60 steps", Shift(150, 60), 150, lr=5e-3, beta2=0.999, rate=Constant(30)),
    _troubled("targets random over 100 steps", RandomTargets(150, 100), 150, lr=5e-3, rate=Constant(30)),
)
"""Kinds of trouble. The growths are injected; the other causes occur."""

SEEDS = {"calibration": (10, 11), "seen": (0, 1, 2), "unseen": (0, 1), "troubled": (0, 1, 2)}
"""The seeds of each part."""
PARTS = {"calibration": SEEN, "seen": SEEN, "unseen": UNSEEN, "troubled": TROUBLED}
"""The settings of each part. Calibration gives the limits."""
