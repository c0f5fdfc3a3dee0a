"""Synthetic runs: healthy ones of nine kinds, and 18 kinds of trouble.

The shape of the loss, its noise, the schedule and the scale of the loss are drawn at random for each run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from stabletrain.tracking.series import Floats, Layer, Rollback, Series

LENGTHS = (300, 1500, 6000)


def healthy(kind: str, seed: int, steps: int) -> Series:
    """Return a healthy run.

    Args:
        kind: one of `HEALTHY`.
        seed: of all that is drawn.
        steps: its length.
    """
    rng = np.random.default_rng([seed, steps, HEALTHY.index(kind)])
    t = np.arange(steps)
    floor, gain = rng.uniform(0.3, 2.5), rng.uniform(1.0, 4.0)
    level = floor + gain * np.exp(-t / (steps * rng.uniform(0.04, 0.2)))
    noise = _noise(rng, steps, 0.03)
    lr = _decaying(rng, steps)
    if kind == "heavy tails":
        noise += rng.standard_t(3, steps) * 0.05
    elif kind == "constant rate":
        level = floor + gain * (1 + t / rng.uniform(10, 40)) ** -0.45
        lr = np.full(steps, 5e-3)
    elif kind == "fine-tuning":
        level = floor * (1 - 0.12 * (1 - np.exp(-t / (steps / 5))))
        noise = _noise(rng, steps, 0.02 * floor)
    elif kind == "noise that falls with the loss":
        level = gain * np.exp(-t / (steps * 0.15)) + 0.02
        noise = level * (np.exp(rng.normal(0, 0.4, steps)) - 1)
    elif kind == "long tail":  # batches of one sample
        noise = level * (np.exp(rng.normal(0, 0.7, steps)) - 1)
    elif kind == "negative loss":
        level -= floor + gain + rng.uniform(0, 3)
    elif kind == "step schedule":
        stage = np.searchsorted([0.5 * steps, 0.75 * steps], t, side="right")
        lr = 0.1 * 0.1**stage
        level = level + 0.15 * 0.4**stage
    elif kind == "epochs":
        noise += 0.03 * np.sin(2 * np.pi * t / (steps / 10))
    val_at = np.arange(steps // 10, steps, steps // 10)
    val = level[val_at] + 0.1 + rng.normal(0, 0.01, len(val_at))
    return Series(
        step=t,
        loss=level + noise,
        grad_norm=np.exp(rng.normal(-0.5, rng.uniform(0.2, 0.5), steps)) * (1 + np.exp(-t / 50)),
        clipped=(rng.random(steps) < rng.uniform(0, 0.1)).astype(float),
        skipped=np.zeros(steps),
        overflow=np.zeros(steps),
        without_loss=np.zeros(steps),
        lr=lr,
        validation=(val_at, val),
    )


def _noise(rng: np.random.Generator, steps: int, scale: float) -> Floats:
    """Noise of a batch's loss: skewed to the right or not."""
    if rng.random() < 0.5:
        return rng.normal(0, scale * 1.5, steps)
    return rng.gamma(4, scale, steps) - 4 * scale


def _decaying(rng: np.random.Generator, steps: int) -> Floats:
    t = np.arange(steps)
    peak, warm = 10 ** rng.uniform(-4, -1), max(1, int(rng.uniform(0.01, 0.1) * steps))
    down = np.clip((t - warm) / max(1, steps - warm), 0, 1)
    shape = rng.integers(3)
    if shape == 0:
        factor = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * down))
    elif shape == 1:
        factor = 1 - down
    else:  # stable, then a decay over the last fifth
        factor = np.clip((1 - t / steps) / 0.2, 0, 1)
    return peak * np.where(t < warm, (t + 1) / warm, factor)


HEALTHY = (
    "plain",
    "heavy tails",
    "constant rate",
    "fine-tuning",
    "noise that falls with the loss",
    "long tail",
    "negative loss",
    "step schedule",
    "epochs",
)

Trouble = Callable[[Series, np.random.Generator], Series]


def _diverged(run: Series, rng: np.random.Generator) -> Series:
    loss, n = run.loss.copy(), len(run.loss)
    begin = int(n * rng.uniform(0.3, 0.8))
    loss[begin:] = loss[0] * rng.uniform(1, 2) + rng.normal(0, 0.2, n - begin)
    return replace(run, loss=loss)


def _diverged_to_nan(run: Series, rng: np.random.Generator) -> Series:
    loss = run.loss.copy()
    loss[int(len(loss) * rng.uniform(0.2, 0.999)) :] = np.nan
    return replace(run, loss=loss)


def _did_not_learn(run: Series, rng: np.random.Generator) -> Series:
    return replace(run, loss=rng.uniform(0.7, 10) * (1 + rng.normal(0, 0.02, len(run.loss))))


def _rises(run: Series, rng: np.random.Generator) -> Series:
    loss, n = run.loss.copy(), int(len(run.loss) * rng.uniform(0.1, 0.2))
    loss[:n] += rng.uniform(0.8, 2) * (loss[0] + 1) * np.sin(np.pi * np.arange(n) / n) ** 0.5
    return replace(run, loss=loss)


def _still_improving(run: Series, rng: np.random.Generator) -> Series:
    t = np.linspace(0, 1, len(run.loss))
    loss = 4.2 - rng.uniform(0.8, 2) * t + rng.normal(0, 0.05, len(t))
    return replace(run, loss=loss, lr=np.full(len(t), 1e-5))


def _plateau(run: Series, rng: np.random.Generator) -> Series:
    t = np.arange(len(run.loss))
    loss = rng.uniform(1, 3) + 1.2 * np.exp(-t / (len(t) * rng.uniform(0.03, 0.08))) + rng.normal(0, 0.03, len(t))
    return replace(run, loss=loss, lr=np.full(len(t), 5e-3))


def _overfitting(run: Series, rng: np.random.Generator) -> Series:
    at, values = run.validation
    gain = float(values[0] - values.min()) + 0.3 * float(abs(values.min()))
    rise = rng.uniform(0.8, 2) * gain * np.maximum(0, at / len(run.loss) - 0.4)
    t = np.arange(len(run.loss))
    return replace(run, loss=run.loss - 0.3 * t / len(t), validation=(at, values + rise))


def _clipped_always(run: Series, rng: np.random.Generator) -> Series:
    return replace(run, clipped=(rng.random(len(run.loss)) < rng.uniform(0.6, 1)).astype(float))


def _clipped_never(run: Series, rng: np.random.Generator) -> Series:
    return replace(run, clipped=np.zeros(len(run.loss)), bound=100.0)


def _gradients_grow(run: Series, rng: np.random.Generator) -> Series:
    assert run.grad_norm is not None
    return replace(run, grad_norm=run.grad_norm * np.exp(rng.uniform(4, 7) * np.linspace(0, 1, len(run.loss))))


def _vanishing(run: Series, rng: np.random.Generator) -> Series:
    return replace(run, layers=[Layer(f"net.{i}", 10.0 ** (i - 5 - rng.uniform(0, 2) * (i == 0))) for i in range(5)])


def _spiky(run: Series, rng: np.random.Generator) -> Series:
    loss, n = run.loss.copy(), len(run.loss)
    at = rng.choice(np.arange(150, n), max(3, n // 70), replace=False)
    loss[at] += rng.uniform(0.5, 1.5) * (run.loss[0] - run.loss[-1])
    return replace(run, loss=loss)


def _nonfinite(run: Series, rng: np.random.Generator) -> Series:
    loss, skipped = run.loss.copy(), np.zeros(len(run.loss))
    at = rng.choice(len(loss), len(loss) // 40, replace=False)
    loss[at], skipped[at] = np.nan, 1.0
    return replace(run, loss=loss, skipped=skipped)


def _skips_in_one_place(run: Series, rng: np.random.Generator) -> Series:
    skipped = np.zeros(len(run.loss))
    begin, width = int(len(skipped) * rng.uniform(0.2, 0.8)), max(10, len(skipped) // 40)
    skipped[begin : begin + width : max(1, width // 10)] = 1
    return replace(run, skipped=skipped)


def _overflows(run: Series, rng: np.random.Generator) -> Series:
    return replace(run, overflow=(rng.random(len(run.loss)) < rng.uniform(0.08, 0.3)).astype(float))


def _scale_collapsed(run: Series, rng: np.random.Generator) -> Series:
    return replace(run, loss_scale=2.0 ** -int(rng.integers(1, 9)))


def _rate_ends_early(run: Series, rng: np.random.Generator) -> Series:
    n = len(run.loss)
    t, total = np.arange(n), rng.uniform(0.4, 0.85) * n
    down = np.clip(t / total, 0, 1)
    factor = 1 - down if rng.random() < 0.5 else 0.5 * (1 + np.cos(np.pi * down))
    return replace(run, lr=5e-3 * (0.05 + 0.95 * factor))


def _rollbacks(run: Series, rng: np.random.Generator) -> Series:
    n, batches = len(run.loss), [f"[0, {i}]" for i in range(40)]
    return replace(
        run,
        rollbacks=(
            Rollback(n // 3, n // 3 - 20, frozenset(batches[:20])),
            Rollback(2 * n // 3, 2 * n // 3 - 20, frozenset(batches[15:35])),
        ),
    )


TROUBLES: tuple[tuple[str, str, Trouble], ...] = (
    ("diverged", "diverged", _diverged),
    ("NaN to the end", "diverged", _diverged_to_nan),
    ("did not learn", "did not learn", _did_not_learn),
    ("rises at the start", "rises at the start", _rises),
    ("still improving", "still improving", _still_improving),
    ("plateau", "plateau", _plateau),
    ("overfitting", "overfitting", _overfitting),
    ("clipped always", "clipped always", _clipped_always),
    ("clipped never", "clipped never", _clipped_never),
    ("gradients grow", "gradients grow", _gradients_grow),
    ("vanishing", "vanishing", _vanishing),
    ("spiky", "spiky", _spiky),
    ("NaN now and then", "non-finite often", _nonfinite),
    ("skips in one place", "skips in one place", _skips_in_one_place),
    ("overflows", "overflows", _overflows),
    ("scale collapsed", "scale collapsed", _scale_collapsed),
    ("rate ends early", "rate at its end early", _rate_ends_early),
    ("rollbacks in one place", "rollbacks in one place", _rollbacks),
)
"""Name, the finding that is expected, and what is made of a plain healthy run."""


def troubled(name: str, seed: int, steps: int) -> Series:
    """Return a run in trouble.

    Args:
        name: of one of `TROUBLES`.
        seed: of all that is drawn.
        steps: its length.
    """
    index = [each[0] for each in TROUBLES].index(name)
    rng = np.random.default_rng([seed, steps, 1000 + index])
    return TROUBLES[index][2](healthy("plain", seed + 5000, steps), rng)
