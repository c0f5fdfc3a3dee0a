"""The bugs and the healthy modules on which the thresholds were set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import lightning as L
import torch

from doctor_suite.modules import (
    TRAINING,
    Binary,
    Encoder,
    Loaders,
    Lstm,
    Mlp,
    Regression,
    digit_loaders,
    digits,
    table_loaders,
    text_loaders,
)


class Planted(NamedTuple):
    """A module with its data.

    Args:
        name: of the bug, or of the healthy module.
        module: makes it.
        loaders: makes its loaders.
        found_by: names of checks of which one should have a finding; empty: it is healthy.
    """

    name: str
    module: Callable[[], L.LightningModule]
    loaders: Callable[[], Loaders]
    found_by: frozenset[str] = frozenset()


def _bug(name: str, module: Callable[[], L.LightningModule], loaders: Callable[[], Loaders], *found_by: str) -> Planted:
    return Planted(name, module, loaders, frozenset(found_by))


def _shuffled_labels() -> Loaders:
    y = digits()[1][:TRAINING]
    return digit_loaders(y=y[torch.randperm(TRAINING, generator=torch.Generator().manual_seed(1))])


def _one_nan() -> Loaders:
    x = digits()[0][:TRAINING].clone()
    x[700, 0, 3, 3] = math.nan
    return digit_loaders(x=x)


def _sorted() -> Loaders:
    x, y = digits()
    order = y[:TRAINING].argsort()
    return digit_loaders(x=x[:TRAINING][order], y=y[:TRAINING][order], shuffle=False)


def _with_constant() -> Loaders:
    x, y = digits()
    table = torch.cat([x.flatten(1)[:, 20:44], torch.ones(len(x), 1)], 1)
    return digit_loaders(x=table[:TRAINING], vx=table[TRAINING:], vy=y[TRAINING:])


def _leak() -> Loaders:
    x, y = digits()
    return digit_loaders(vx=x[TRAINING - 100 :], vy=y[TRAINING - 100 :])


def _repeated() -> Loaders:
    x, y = digits()
    return digit_loaders(x=torch.cat([x[:1200], x[:200]]), y=torch.cat([y[:1200], y[:200]]))


_RATE_HIGH = ("rate too high", "loss rises", "no better than guessing", "non-finite loss")
_RATE_LOW = ("rate too low", "one batch", "no better than guessing")

BUGS: tuple[Planted, ...] = (
    _bug("labels shuffled", Mlp, _shuffled_labels, "no better than guessing"),
    _bug("zero_grad missing", lambda: Mlp("zero_grad"), digit_loaders, "stale gradients"),
    _bug("softmax twice", lambda: Mlp("softmax"), digit_loaders, "probabilities"),
    _bug("pixels 0..255", Mlp, lambda: digit_loaders(x=digits()[0][:TRAINING] * 255), "scale"),
    _bug("dead ReLU", lambda: Mlp("dead"), digit_loaders, "dead units"),
    _bug("init std 2", lambda: Mlp("init"), digit_loaders, "loss at the start", "size of outputs"),
    _bug("frozen layer", lambda: Mlp("frozen"), digit_loaders, "frozen"),
    _bug("head not in the optimizer", lambda: Mlp("head"), digit_loaders, "not in optimizer"),
    _bug("sum reduction", lambda: Mlp("sum"), digit_loaders, "sum reduction"),
    _bug("training samples in validation", Mlp, _leak, "leak"),
    _bug("repeated training samples", Mlp, _repeated, "duplicates"),
    _bug("NaN in one image", Mlp, _one_nan, "non-finite data"),
    _bug("constant feature", lambda: Mlp(inputs=25), _with_constant, "constant features"),
    _bug("BatchNorm, batches of 2", lambda: Mlp(norm=True), lambda: digit_loaders(batch_size=2),
         "few values in BatchNorm"),
    _bug("eval mode left on", lambda: Mlp("eval"), digit_loaders, "eval mode"),
    _bug("rate x100", lambda: Mlp(lr=0.3), digit_loaders, *_RATE_HIGH),
    _bug("rate x1000, SGD", lambda: Mlp(lr=10.0, sgd=True), digit_loaders, *_RATE_HIGH),
    _bug("rate /100", lambda: Mlp(lr=3e-5), digit_loaders, *_RATE_LOW),
    _bug("rate /1000", lambda: Mlp(lr=3e-6), digit_loaders, *_RATE_LOW),
    _bug("sorted by label", Mlp, _sorted, "order"),
    _bug("input ignored", lambda: Mlp("ignores"), digit_loaders, "ignores input", "no better than guessing"),
    _bug("labels from 1 to 10", Mlp, lambda: digit_loaders(y=digits()[1][:TRAINING] + 1), "label range", "raises"),
    _bug("target without its second dimension", lambda: Regression(squeezed=True), table_loaders, "broadcast"),
    _bug("output detached", lambda: Mlp("detach"), digit_loaders, "unused", "one batch", "no better than guessing"),
)  # fmt: skip
"""The 24 bugs that were there when the thresholds were set."""


def _gpt() -> L.LightningModule:
    from stabletrain.workloads import CharGPT

    return CharGPT(2, 4, 48, 24, sample_length=0)


def _cnn() -> L.LightningModule:
    from stabletrain.workloads import DigitsCNN

    return DigitsCNN(8)


def _cnn_loaders() -> Loaders:
    from stabletrain.workloads import DigitsData

    data = DigitsData()
    data.setup("fit")
    return data.train_dataloader(), data.val_dataloader()


HEALTHY: tuple[Planted, ...] = (
    Planted("char_gpt", _gpt, text_loaders),
    Planted("digits_cnn", _cnn, _cnn_loaders),
    Planted("LSTM", Lstm, text_loaders),
    Planted("nn.TransformerEncoderLayer", Encoder, text_loaders),
    Planted("MLP, Adam", Mlp, digit_loaders),
    Planted("MLP, BatchNorm, SGD", lambda: Mlp(norm=True, lr=0.05, sgd=True), digit_loaders),
    Planted("regression", Regression, table_loaders),
    Planted("binary", Binary, digit_loaders),
)
"""The 8 healthy modules that were there when the thresholds were set."""
