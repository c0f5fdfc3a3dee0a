"""Going back and resuming: the same bits again, random numbers of the device included."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import HEALTHY, assert_same, batches, everything
from going_back import GoBack
from killed_on_device import train
from lightning.pytorch import seed_everything
from places import FUSED, READ_BY_HOST, Place, Trained, Where
from processes import HELPERS, environment
from torch import Tensor

import stabletrain as st
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers
from stabletrain.runtime.snapshots.buffers import Where as Memory
from stabletrain.runtime.snapshots.overlap import Overlap
from stabletrain.runtime.snapshots.snapshot import Snapshot


def trained(place: Place, optimizer: str, precision: str, memory: Memory, *at: int) -> tuple[dict[str, Tensor], Where]:
    """Train with dropout and go back at some batches; what a step changes, and what was recorded."""
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    seed_everything(0, verbose=False)
    overlap, where = Overlap(), Where()
    go_back = GoBack(2, at, make=lambda: Snapshot(SnapshotBuffers(memory), overlap))
    plugins = [st.ClipZScore(), go_back, where, place.guard(optimizer in FUSED, precision)]
    scale = {"init_scale": 2.0**20} if precision == "16-mixed" else {}
    items = batches(*[HEALTHY] * 24)
    trainer = place.fit(Trained(optimizer, dropout=0.3), items, *plugins, precision=precision, **scale)
    assert go_back.went_back == len(at)
    overlap.close()
    return everything(trainer), where


@pytest.mark.parametrize("memory", ["host", pytest.param("device", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimizer", [*FUSED, *READ_BY_HOST])
def test_going_back_makes_the_same_steps_again(place: Place, optimizer: str, precision: str, memory: Memory) -> None:
    """Bugs: weights that are copied after the update; a scale, generator or counter that is not put back.

    The first rollback is to a copy that was complete when it was taken, the second to one made beside the next step.
    """
    straight, there = trained(place, optimizer, precision, memory)
    went_back, where = trained(place, optimizer, precision, memory, 7, 17)
    assert_same(went_back, straight)
    assert torch.equal(where.generator, there.generator)
    assert len(where.losses) > len(there.losses)
    assert {*where.losses} == {*there.losses}, "a step that was made again had another loss"


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "precision"), [("adamw-fused", "bf16-mixed"), ("adamw-foreach", "16-mixed")])
def test_a_killed_run_resumes_exactly(place: Place, optimizer: str, precision: str, tmp_path: Path) -> None:
    """Bug: a checkpoint that lacks the device's generator, the loss scaler or the position in the data."""
    script = str(HELPERS / "killed_on_device.py")
    arguments = [str(tmp_path / "killed"), place.device, precision, optimizer, "13"]
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment(HELPERS), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (trainer, resumed), (other, whole) = (
        train(tmp_path / name, place, precision, optimizer, resume=name == "killed") for name in ("killed", "whole")
    )
    assert_same(everything(trainer), everything(other))
    assert torch.equal(resumed.generator, whole.generator)
    rest = len(resumed.losses)
    assert 0 < rest < 24
    assert repr(resumed.losses) == repr(whole.losses[-rest:])  # two are NaN
