"""In device mode nothing of a healthy step waits for the device, but for the outcome of the step before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_operations import counts
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from places import Place, TinyMLP

import stabletrain as st
from stabletrain.runtime.guard.signals import SignalCopy

STEPS, WARM_UP = 270, 70
"""With the defaults the first snapshots are taken at steps 1 to 32, and then every 50 steps."""
BATCHES = [(torch.randn(4, 8), torch.randn(4, 1)) for _ in range(STEPS)]


def stack(place: Place, folder: Path) -> list[Callback]:
    """The default stack, with a checkpoint in no interval that the test reaches."""
    return [*st.default_callbacks(), place.guard(fused=True), st.SaveCheckpoints(folder, every=10 * STEPS)]


def forbidden(place: Place) -> list[Callback]:
    """Callbacks for the beginning and the end of the list: in between, a wait for the device is an error."""

    def start(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if place.on_cuda and batch_idx >= WARM_UP and not trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("error")

    def end(*_: Any) -> None:
        if place.on_cuda:
            torch.cuda.set_sync_debug_mode("default")

    return [LambdaCallback(on_train_batch_start=start), LambdaCallback(on_train_batch_end=end, on_exception=end)]


@pytest.mark.parametrize("what", ["bare", "stack"])
def test_200_steps(place: Place, what: str, tmp_path: Path) -> None:
    """Bugs: an ``.item()`` in a hook; a snapshot or a check of the weights for which the host waits.

    What torch finds on CUDA is an error there; on the CPU the operations that read are counted. The bare run shows
    that nothing else waits.
    """
    waits = SignalCopy.waits
    mine = stack(place, tmp_path) if what == "stack" else []

    def train(counting: list[Callback]) -> object:
        start, end = forbidden(place)
        callbacks = [counting[0], start, *mine, end, counting[-1]]
        options = {"log_every_n_steps": 10 * STEPS, "default_root_dir": tmp_path}
        return place.fit(TinyMLP(), BATCHES, *callbacks, **options)

    found = counts(train)[WARM_UP:] if not place.on_cuda else _train_only(train)
    assert not any(reads for _, reads in found)
    expected = 0 if what == "bare" else STEPS + STEPS // 10  # the weights are looked at every ten steps
    assert abs(SignalCopy.waits - waits - expected) <= 8, "and one at each of the first snapshots"


def _train_only(train: Callable[[list[Callback]], object]) -> list[tuple[int, int]]:
    train([Callback(), Callback()])
    return []
