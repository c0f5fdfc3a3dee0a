"""One run: a setting and a seed, all readings at every step, and the record that is kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from json_lines import Record
from torch import Tensor, nn

from early_warning_suite import data, detectors, judge, models
from early_warning_suite.readings import FEW, LINEAR, READINGS, Reader
from early_warning_suite.settings import STEPS, Setting
from early_warning_suite.sharpness import sharpness

SHARPNESS_EVERY = 50
_HELD_OUT_STEP = 10**6
"""A batch of which the curvature is measured, always the same."""

Series = dict[str, list[float | None]]


def record(part: str, setting: Setting, seed: int, steps: int = STEPS) -> Record:
    """Train, and return what is kept: when the loss rose, and a summary of each reading.

    Args:
        part: ``calibration``, ``seen``, ``unseen`` or ``troubled``.
        setting: what is trained.
        seed: of weights and batches.
        steps: of the run; fewer for a test.
    """
    begin = time.process_time()
    series = train(setting, seed, steps)
    losses, norms = _numbers(series["loss"]), _numbers(series["grad_norm"])
    series |= judge.from_losses(losses, norms)
    kept = {
        each.key: judge.summary(series[each.key], setting.start, few=each.key in FEW, linear=each.key in LINEAR)
        for each in READINGS
        if each.key in series
    }
    means = judge.means(losses)
    return {
        **key(part, setting, seed),
        "steps": len(losses),
        "risen": judge.risen(losses),
        "loss": [judge.rounded(x) for x in (losses[0], min(means[judge.MEAN_OF - 1 :], default=losses[0]), means[-1])],
        "detect_spikes": detectors.detect_spikes(losses, norms)[:20],
        "skip_outliers": detectors.skip_outliers(losses, norms)[:20],
        "slow_rise": detectors.slow_rise(losses)[:20],
        "readings": {name: summary._asdict() for name, summary in kept.items() if summary is not None},
        "seconds": round(time.process_time() - begin, 1),
    }


def key(part: str, setting: Setting, seed: int) -> Record:
    """Return what a record is known by; ``setup`` makes a run of a changed setting another one."""
    return {"part": part, "setting": setting.name, "seed": seed, "setup": setting.digest}


def train(setting: Setting, seed: int, steps: int = STEPS) -> Series:
    """Train, and return loss, gradient norm and all readings at every step.

    The run ends where the loss or the gradient norm is not finite.
    """
    torch.manual_seed(seed)
    net = models.build(setting.model, setting.layers, setting.width, setting.qk_norm)
    optimizer = _optimizer(setting, net)
    reader = Reader(net, optimizer)
    series: Series = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * setting.rate(step)
        inputs, targets = batch(setting, seed, step)
        if setting.grow is not None:
            setting.grow(step, net)
        with reader.forward():
            logits = net(inputs)
            loss = _loss(logits.half() if setting.fp16_logits else logits, targets).float()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        reader.before_step()
        if setting.clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), setting.clip)
        optimizer.step()
        values: dict[str, float | None] = {**reader.after_step()}
        if (step + 1) % SHARPNESS_EVERY == 0:
            values["sharpness"] = sharpness(net, _held_out(setting, seed, net), optimizer)
        for name, value in values.items():
            series.setdefault(name, [None] * step).append(value)
        for name, column in series.items():
            if name not in values:
                column.append(None)
        if not (math.isfinite(_last(series["loss"])) and math.isfinite(_last(series["grad_norm"]))):
            break
    return series


def batch(setting: Setting, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step."""
    if setting.model == "cnn":
        return data.digits(seed, step)
    windows = data.windows_of_text(seed, step)
    return setting.data(step, windows) if setting.data is not None else (windows[:, :-1], windows[:, 1:])


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _held_out(setting: Setting, seed: int, net: nn.Module) -> Callable[[], Tensor]:
    if setting.model == "cnn":
        inputs, targets = data.digits(seed, _HELD_OUT_STEP)
    else:
        windows = data.windows_of_text(seed, _HELD_OUT_STEP)
        inputs, targets = windows[:, :-1], windows[:, 1:]
    return lambda: _loss(net(inputs), targets)


def _optimizer(setting: Setting, net: nn.Module) -> torch.optim.Optimizer:
    if not setting.adamw:
        return torch.optim.SGD(net.parameters(), setting.lr, momentum=0.9, weight_decay=setting.decay)
    return torch.optim.AdamW(net.parameters(), setting.lr, betas=(0.9, setting.beta2), weight_decay=setting.decay)


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _last(values: list[float | None]) -> float:
    value = values[-1]
    assert value is not None, "every step has a loss and a gradient norm"
    return value
