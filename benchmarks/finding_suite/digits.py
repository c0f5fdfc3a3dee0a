"""Small real trainings on scikit-learn's digits in plain torch: healthy ones, and ones with a known trouble."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from stabletrain.tracking.series import Layer, Series

STEPS = 600
_HELD_OUT = 360


@dataclass(frozen=True, kw_only=True)
class Condition:
    """How to train.

    Args:
        name: of the condition.
        finding: that is expected; empty: none.
        lr: peak rate of SGD with momentum 0.9.
        warmup: share of the steps.
        constant: whether the rate stays at its peak, instead of a cosine down to a tenth of it.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        sigmoid: instead of ReLU.
        bound: of the gradient norm.
        examples: of the training set; None: all.
        wrong_labels: share of labels that are drawn at random.
    """

    name: str
    finding: str
    lr: float = 0.1
    warmup: float = 0.05
    constant: bool = False
    hidden: int = 64
    depth: int = 2
    sigmoid: bool = False
    bound: float = math.inf
    examples: int | None = None
    wrong_labels: float = 0.0


CONDITIONS = (
    Condition(name="healthy", finding=""),
    Condition(name="healthy, clipped at 3", finding="", bound=3.0),
    Condition(name="rate too high", finding="diverged, rises at the start or did not learn", lr=30.0),
    Condition(
        name="high rate without warm-up", finding="diverged, rises at the start or did not learn", lr=2.0, warmup=0.0
    ),
    Condition(name="rate too low", finding="did not learn or still improving", lr=2e-4, constant=True),
    Condition(name="ten sigmoid layers", finding="vanishing", depth=10, sigmoid=True),
    Condition(name="few examples, wrong labels", finding="overfitting", lr=0.3, examples=100, wrong_labels=0.2),
    Condition(name="clipped at 0.05", finding="clipped always", bound=0.05),
    Condition(name="two hidden units", finding="plateau", constant=True, hidden=2, depth=1),
    Condition(name="labels at random", finding="overfitting or did not learn", wrong_labels=1.0),
)
"""The conditions of the result page."""


@cache
def _data() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    inputs, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    return torch.tensor(inputs / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def _network(condition: Condition) -> nn.Sequential:
    widths = [64, *[condition.hidden] * condition.depth, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid() if condition.sigmoid else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(condition: Condition, seed: int) -> Series:
    """Train once, and return what was recorded.

    Args:
        condition: how.
        seed: of weights, batches and wrong labels.
    """
    torch.manual_seed(seed)
    inputs, labels = _data()
    held_out_inputs, held_out_labels = inputs[-_HELD_OUT:], labels[-_HELD_OUT:]
    count = condition.examples or len(inputs) - _HELD_OUT
    inputs, labels = inputs[:count], labels[:count].clone()
    wrong = torch.rand(count) < condition.wrong_labels
    labels[wrong] = torch.randint(0, 10, (int(wrong.sum()),))
    network = _network(condition)
    weights = [layer.weight for layer in network if isinstance(layer, nn.Linear)]
    optimizer = torch.optim.SGD(network.parameters(), condition.lr, momentum=0.9)
    warm = condition.warmup * STEPS
    rows, sizes, validation = [], [], []
    for step in range(STEPS):
        down = 1.0 if condition.constant else 0.55 + 0.45 * math.cos(math.pi * (step - warm) / (STEPS - warm))
        rate = condition.lr * min(1.0, (step + 1) / warm if step < warm else down)
        optimizer.param_groups[0]["lr"] = rate
        at = torch.randint(0, count, (64,))
        loss = nn.functional.cross_entropy(network(inputs[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        value = float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(network.parameters(), condition.bound))
        skipped = not (math.isfinite(value) and math.isfinite(norm))
        rows.append((value, norm, norm > condition.bound, skipped, rate))
        sizes.append([float(w.grad.square().mean().sqrt()) for w in weights if w.grad is not None])
        if not skipped:
            optimizer.step()
        if step % 30 == 29:
            with torch.no_grad():
                held_out = nn.functional.cross_entropy(network(held_out_inputs), held_out_labels)
            validation.append((step, float(held_out)))
    columns = np.array(rows, dtype=np.float64).T
    return Series(
        step=np.arange(STEPS),
        loss=columns[0],
        grad_norm=columns[1],
        clipped=columns[2],
        skipped=columns[3],
        lr=columns[4],
        validation=(np.array([at for at, _ in validation]), np.array([value for _, value in validation])),
        layers=[Layer(f"layer {i}", float(rms)) for i, rms in enumerate(np.median(sizes, axis=0))],
    )
