"""What goes wrong on a GPU ends with one message, and with the last checkpoint complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fits import HEALTHY, batches
from places import CPU, DeviceFails, Place, Trained
from rank_pool import on_ranks
from ranks_on_device import on_the_first_gpu

import stabletrain as st
from stabletrain.errors import UserError
from stabletrain.launch.cause import cause_of
from stabletrain.runtime.checkpoints import verify
from stabletrain.runtime.guard.signals import SignalCopy


def test_a_device_that_is_lost(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: the end of the run waits for the lost device, or the exception of the cleaning up hides the first one.

    After ten steps the norms of the weights are on their way to the host.
    """

    def lose() -> None:
        monkeypatch.setattr(SignalCopy, "read", Mock(side_effect=RuntimeError("CUDA error: read of a lost device")))

    saver = st.SaveCheckpoints(tmp_path, every=4)
    stack = [*st.default_callbacks(), place.guard(fused=True), saver, DeviceFails(at=10, then=lose)]
    with pytest.raises(RuntimeError, match="unspecified launch failure") as lost:
        place.fit(Trained("adamw-fused"), batches(*[HEALTHY] * 16), *stack, default_root_dir=tmp_path)
    result = cause_of(lost.value, started=True)
    assert (result.result.end, result.show, result.lost) == ("failed", "traceback", "")
    assert "unspecified launch failure" in result.result.message
    assert saver.last is not None
    assert Path(saver.last).name.endswith("8")
    verify(Path(saver.last))


def test_snapshots_without_room_on_the_device(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a run that is ended by CUDA's out of memory at its first snapshot."""
    from stabletrain_plugins.rollback import memory

    monkeypatch.setattr(memory, "device_memory", lambda device: 1000.0)
    if place is CPU:
        monkeypatch.setattr(memory, "is_on_device", lambda rule, device: True)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    rollback = st.Rollback(where="device")
    with pytest.raises(UserError, match=r"rollback: 3 snapshots of .* more than the 1 KB .*Rollback\(where=.host.\)"):
        place.fit(Trained("adamw-fused"), batches(*[HEALTHY] * 8), rollback, default_root_dir=tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: on a machine with one, `make gpu`")
def test_two_processes_on_one_card(tmp_path: Path) -> None:
    """Bug: NCCL's refusal is taken for a lost connection. The text itself is tested with the causes of ends."""
    messages: list[Any] = on_ranks(on_the_first_gpu, 2, tmp_path)
    assert all("rank 0 and rank 1 use the same GPU" in each for each in messages), messages
