"""Shared by the tests of the checkpoint store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stabletrain.runtime.checkpoints import CheckpointInfo, Retention, Saver, Store

Write = Callable[..., Path]


def content(step: int) -> dict[str, Any]:
    """A checkpoint with its step in every value."""
    return {"step": step, "weights": torch.full((1000,), float(step)), "small": torch.tensor(step, dtype=torch.int16)}


def save(folder: Path, step: int, run: str = "a", retention: Retention | None = None, **info: Any) -> Path:
    """Write a checkpoint and return its folder."""
    saver = Saver(Store(folder, retention or Retention(last=None)))
    saver.save(content(step), CheckpointInfo(step=step, run=run, **info), wait=True)
    assert saver.newest is not None
    return saver.newest


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint of a step into tmp_path."""
    return lambda step, **options: save(tmp_path, step, **options)
