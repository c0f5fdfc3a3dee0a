"""Batches of real data, each a function of seed and step: text and digits, also with faults of the data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from stabletrain import workloads
from stabletrain.workloads import text

VOCABULARY = len(text.VOCABULARY)
CONTEXT, WINDOWS, IMAGES = 24, 8, 64
"""Tokens of an input; windows in a batch of text; images in a batch of digits."""
_TRAINING_IMAGES = 1500


@dataclass(frozen=True)
class Shift:
    """From a step on, more and more windows have their characters exchanged for one another, in the end all.

    Args:
        start: first step with the fault.
        steps: until all windows have it.
    """

    start: int
    steps: int

    def __call__(self, step: int, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step's windows."""
        if step >= self.start:
            chosen = torch.rand(len(windows), generator=_seeded(step)) < (step - self.start + 1) / self.steps
            exchanged = torch.randperm(VOCABULARY, generator=_seeded(9))
            windows = torch.where(chosen[:, None], exchanged[windows], windows)
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class RandomTargets:
    """From a step on, more and more targets are drawn at random, in the end all.

    Args:
        start: first step with the fault.
        steps: until all targets have it.
    """

    start: int
    steps: int

    def __call__(self, step: int, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step's windows."""
        inputs, targets = windows[:, :-1], windows[:, 1:]
        if step >= self.start:
            generator = _seeded(step)
            chosen = torch.rand(targets.shape, generator=generator) < (step - self.start) / self.steps
            targets = torch.where(chosen, torch.randint(0, VOCABULARY, targets.shape, generator=generator), targets)
        return inputs, targets


def windows_of_text(seed: int, step: int) -> Tensor:
    """A batch of the text that stabletrain distributes, int64 (WINDOWS, CONTEXT + 1)."""
    tokens = _tokens()
    first = torch.randint(0, len(tokens) - CONTEXT - 1, (WINDOWS,), generator=_seeded(seed * 100_003 + step))
    return tokens[first[:, None] + torch.arange(CONTEXT + 1)]


def digits(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A batch of scikit-learn's digits: float (IMAGES, 1, 8, 8) in 0 .. 1, and their classes."""
    images, classes = _digits()
    chosen = torch.randint(0, _TRAINING_IMAGES, (IMAGES,), generator=_seeded(seed * 100_003 + step))
    return images[chosen], classes[chosen]


@cache
def _tokens() -> Tensor:
    path = Path(workloads.__file__).parent / "data" / "shakespeare.txt.gz"
    return text.encode(text.read_text(path, None)[0]).long()


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
