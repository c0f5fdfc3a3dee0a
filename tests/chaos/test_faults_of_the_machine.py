"""Signals, checkpoints on disk and a full disk; and the options that ship with them."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

import stabletrain.chaos
from stabletrain import SaveCheckpoints
from stabletrain.chaos import FlipCheckpointBit, FullDisk, SendSignal
from stabletrain.chaos.disk import NoSpace
from stabletrain.config.build import build_callback
from stabletrain.config.validate import check_node
from stabletrain.errors import UserError
from stabletrain.paths import data_dir
from stabletrain.runtime.checkpoints import CheckpointError, verify

OPTIONS = sorted((data_dir("conf") / "chaos").glob("*.yaml"))

# ---- signals --------------------------------------------------------------------------------------------------------

SCRIPT = """
import logging, sys
from pathlib import Path
from lightning.pytorch import Callback
from stabletrain.chaos import SendSignal
from stabletrain.testing.toy import fit

class PrintSteps(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        print("step", batch_idx, flush=True)

logging.disable(logging.INFO)
fit(Path(sys.argv[1]), [SendSignal(**eval(sys.argv[2])), PrintSteps()], steps=6, watch=False)
print("done", flush=True)
"""


def script(folder, **arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), repr(arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout.split("\n")[:-1]


def test_sigkill_at_a_step_and_not_again_in_the_same_folder(train, tmp_path, monkeypatch):
    """Bug: a resumed run is killed at the same step for ever; or the signal comes at another step."""
    assert script(tmp_path, at_step=3) == (-signal.SIGKILL, ["step 0", "step 1", "step 2"])
    killed = []
    monkeypatch.setattr("stabletrain.chaos.processes.os.kill", lambda *arguments: killed.append(arguments))
    train(SendSignal(at_step=3))
    assert killed == []
    train(SendSignal(at_step=3, once=False))
    train(SendSignal(at_step=3), folder=tmp_path / "another")
    assert killed == [(os.getpid(), signal.SIGKILL)] * 2


class Elapsed(Callback):
    def __init__(self):
        self.starts = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.starts.append(time.monotonic())


def test_sigstop_stops_for_a_while(train):
    """Bug: the process is never continued, or not stopped."""
    elapsed = Elapsed()
    train(SendSignal(at_step=3, signal="SIGSTOP", seconds=0.3), elapsed, batches=5)
    assert elapsed.starts[3] - elapsed.starts[2] >= 0.3


def test_sigterm_reaches_the_process(train):
    """Bug: the signal goes to a rank that was not chosen."""
    train(SendSignal(at_step=1, signal="SIGTERM", rank=1), batches=4)
    with pytest.raises(SIGTERMException):  # Lightning's way to end a run
        train(SendSignal(at_step=1, signal="SIGTERM"), batches=4)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_one_bit_of_the_newest_checkpoint(train, tmp_path):
    """Bug: an older file, more than one bit, or a file that is still written."""
    folder, written = tmp_path / "kept", {}

    class Read(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for path in folder.glob("*"):
                written.setdefault(path.name, path.read_bytes())

    keep = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    train(Read(), FlipCheckpointBit(at_step=5), keep, enable_checkpointing=True)
    assert sorted(written) == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    flipped = {
        name: sum((a ^ b).bit_count() for a, b in zip((folder / name).read_bytes(), content, strict=True))
        for name, content in written.items()
    }
    assert flipped == {"step=2.ckpt": 0, "step=4.ckpt": 1, "step=6.ckpt": 0}


def test_checkpoints_of_our_own_are_damaged_too(train, tmp_path):
    """Bug: our checkpoints are folders, in which the fault finds no file, and does nothing without a message."""
    keep = SaveCheckpoints(tmp_path / "kept", every=2, keep_last=None, background=False)
    fault = FlipCheckpointBit(at_step=5)
    train(fault, keep, enable_checkpointing=True)
    assert fault._last == 5
    with pytest.raises(CheckpointError, match="checksum"):
        verify(tmp_path / "kept" / "step-00000004")
    assert verify(tmp_path / "kept" / "step-00000008").info.step == 8


def test_it_is_one_bit_and_bit_rot_has_no_time_of_change(tmp_path):
    """Bug: the changed time makes a damaged file the newest one; a fault due before step 0."""
    file = tmp_path / "last.ckpt"
    file.write_bytes(bytes(1000))
    os.utime(file, ns=(10**18, 10**18))

    class Someone:
        global_rank = 0
        checkpoint_callbacks = (ModelCheckpoint(tmp_path),)

    fault = FlipCheckpointBit(at_step=0)
    assert fault.is_due(Someone(), 0)
    fault.apply(Someone(), None, 0)
    content = file.read_bytes()
    assert sum(byte.bit_count() for byte in content) == 1
    assert file.stat().st_mtime_ns == 10**18
    assert not fault.is_due(Someone(), -1)


def test_without_a_checkpoint_it_waits(train, tmp_path):
    """Bug: without a file at its step, the fault never comes, or raises."""
    keep = ModelCheckpoint(tmp_path / "late", every_n_train_steps=6, filename="{step}")
    fault = FlipCheckpointBit(at_step=2)
    train(fault, keep, enable_checkpointing=True)
    assert fault._last == 6


# ---- a full disk ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_meets_a_full_disk_and_the_disk_is_free_again_later(train, tmp_path):
    """Bug: saving succeeds on the full disk; the replaced functions of Python and torch stay."""
    functions = (open, io.open, os.write, torch.save, os.pwrite, os.sendfile)
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    with pytest.raises(OSError, match="No space left") as error:
        train(FullDisk(at_step=3), keep, enable_checkpointing=True)
    assert error.value.errno == errno.ENOSPC
    assert (open, io.open, os.write, torch.save, os.pwrite, os.sendfile) == functions
    (tmp_path / "file").write_text("free again")


def test_between_checkpoints_it_does_no_harm(train, tmp_path):
    """Bug: a run that writes nothing at these steps fails."""
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    train(FullDisk(at_step=4, steps=3), keep, enable_checkpointing=True)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["step=4.ckpt", "step=8.ckpt"]


def moved(path: Path):
    source = path.parents[1] / "elsewhere"
    source.write_bytes(b"x" * 100)
    return source


def ways_to_write(path: Path):
    def by_descriptor():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            os.write(fd, b"x" * 100)
        finally:
            os.close(fd)

    def by_fdopen():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
            file.write(b"x" * 100)

    return {
        "open": lambda: open(path, "w").write("x" * 100),
        "path": lambda: path.write_bytes(b"x" * 100),
        "os.write": by_descriptor,
        "os.fdopen": by_fdopen,
        "move": lambda: Path(moved(path)).replace(path),
        "torch.save": lambda: torch.save(torch.ones(3), path),
    }


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", ways_to_write(Path()))
def test_every_way_to_write_is_refused_below_the_folder_only(tmp_path, way):
    """Bug: one of the ways to write a file is not simulated, or writes elsewhere fail too."""
    (tmp_path / "full").mkdir()
    (tmp_path / "free").mkdir()
    undo = NoSpace(tmp_path / "full", free=0).install()
    try:
        with pytest.raises((OSError, RuntimeError)):
            ways_to_write(tmp_path / "full" / "file")[way]()
        ways_to_write(tmp_path / "free" / "file")[way]()
    finally:
        undo()
    assert (tmp_path / "free" / "file").stat().st_size >= 100
    ways_to_write(tmp_path / "full" / "file")[way]()


def test_what_is_left_can_be_used_up(tmp_path):
    """Bug: the free bytes are not counted over several files; a second fault that cannot be undone."""
    undo = NoSpace(tmp_path, free=10).install()
    try:
        (tmp_path / "a").write_bytes(b"x" * 6)
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "b").write_text("x" * 6)
        (tmp_path / "c").write_text("x" * 4)
        assert (tmp_path / "a").read_bytes() == b"x" * 6
        with pytest.raises(UserError, match="another FullDisk is active"):
            NoSpace(tmp_path, free=0).install()
    finally:
        undo()


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: file.stem)
def test_an_option_names_every_argument_and_can_be_built(file):
    """Bug: an option file lacks an argument or its explanation, or cannot be built."""
    import inspect

    text = file.read_text("utf-8")
    node = yaml.safe_load(text)
    assert node["at_step"] == "???"
    node["at_step"] = 100
    fault = build_callback(node, key="chaos")
    assert set(node) - {"_target_"} == set(inspect.signature(type(fault)).parameters)
    assert list(check_node(node, "chaos")) == []
    assert all("  # " in line for line in text.splitlines() if not line.startswith(("#", "_target_")))


def test_every_fault_has_an_option():
    """Bug: a fault that no config can select."""
    named = {yaml.safe_load(file.read_text("utf-8"))["_target_"].rsplit(".", 1)[1] for file in OPTIONS}
    assert named == set(stabletrain.chaos.__all__) - {"Fault"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SendSignal(at_step=0, signal="SIGHUP"), r"signal must be one of SIGKILL.*chaos\.signal"),
        (lambda: SendSignal(at_step=0, seconds=1.0), "seconds must be None unless signal is SIGSTOP"),
        (lambda: SendSignal(at_step=0, signal="SIGSTOP", seconds=0.0), "seconds must be > 0"),
        (lambda: FullDisk(at_step=0, free=-1), "free must be >= 0"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    """Bug: accepted arguments of a fault that never comes, or does nothing."""
    with pytest.raises(UserError, match=message):
        make()
