"""Copies in the node's memory with one process; tests/runtime/checkpoints/test_memory_copies.py has several."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from fits import HEALTHY, Net, assert_same, batches, everything
from lightning.pytorch import Callback, Trainer

from stabletrain import ResumeExactly, SaveCheckpoints, UserError
from stabletrain.runtime.checkpoints import Store
from stabletrain.runtime.checkpoints.lightning_io import check_when_reading
from stabletrain.runtime.checkpoints.memory import capacity
from stabletrain.runtime.checkpoints.memory.place import Place
from stabletrain.runtime.stop import TrainingStopped

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty:UserWarning"),
]


class Crash(Callback):
    """Raises before a step; also what another kind of end raises."""

    def __init__(self, at: int, error: type[BaseException] = RuntimeError) -> None:
        self.at, self.error = at, error

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            saver = next(each for each in trainer.callbacks if isinstance(each, SaveCheckpoints))  # type: ignore[attr-defined]
            if saver._copies is not None:
                saver._copies.wait()
            raise TrainingStopped("test", "planned") if self.error is TrainingStopped else self.error("planned")


class Start(Callback):
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.step = trainer.global_step


def fit(tmp_path: Path, *callbacks: Callback, memory: dict[str, Any] | None = None, **options: Any) -> tuple[Any, int]:
    """The state at the end, None after an exception, and the step at which the fit started."""
    given = {"every": 2, "folder": str(tmp_path / "memory"), **(memory or {})}
    start = Start()
    options = {"max_steps": 10, "max_epochs": -1, **options}
    saver = SaveCheckpoints(tmp_path / "c", every=options.pop("every", None), memory=given)
    mine = None
    with contextlib.suppress(RuntimeError, TrainingStopped):
        mine = fits.fit(
            options.pop("model", None) or Net(dropout=0.1), batches(*[HEALTHY] * 16), ResumeExactly(), start, saver,
            *callbacks, **options,
        )  # fmt: skip
    return None if mine is None else everything(mine), start.step


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "memory").glob("*/*/node-0/whole/step-*"))


class FullDisk(Callback):
    """From a step on, nothing can be written to the disk."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            saver = next(each for each in trainer.callbacks if isinstance(each, SaveCheckpoints))  # type: ignore[attr-defined]
            assert saver._saver is not None
            saver.wait()
            saver._saver._put = self.fail  # type: ignore[method-assign]

    def fail(self, *_: Any) -> Path | None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_copies_are_kept_if_the_last_state_could_not_be_written_to_the_disk(tmp_path: Path) -> None:
    """Bug: a full disk at the end, or on SIGTERM: the copies, which are the newest state then, are removed as well."""
    fit(tmp_path, FullDisk())
    assert [entry.manifest.info.step for entry in Store(tmp_path / "c").entries()] == [1]
    assert [each.name for each in kept(tmp_path)] == ["step-00000008", "step-00000010"]
    assert fit(tmp_path, ckpt_path=tmp_path / "c")[1] == 10
    assert kept(tmp_path) == []


def test_a_crashed_run_goes_on_from_memory_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Bugs: the copy lacks state that the checkpoint on disk has; the older one on disk is taken; copies change the
    run; they are left in memory after the end; more than two are kept."""
    with_memory, _ = fit(tmp_path / "whole")
    assert not (tmp_path / "whole" / "memory").exists() or not list((tmp_path / "whole" / "memory").iterdir())
    without, _ = fit(tmp_path / "without", memory={"every": None})
    assert_same(with_memory, without)
    fit(tmp_path, Crash(9))
    assert [each.name for each in kept(tmp_path)] == ["step-00000006", "step-00000008"]
    assert [entry.manifest.info.step for entry in Store(tmp_path / "c").entries()] == [1]
    end, start = fit(tmp_path, ckpt_path=tmp_path / "c")
    assert start == 8
    assert_same(end, without)
    assert not list((tmp_path / "memory").iterdir())


def test_what_is_newer_on_the_disk_is_taken(tmp_path: Path) -> None:
    """Bugs: an older copy in memory; or the disk although memory is as new."""
    fit(tmp_path, Crash(9), every=3, memory={"every": 7})  # memory: 7, disk: 9
    assert fit(tmp_path, Crash(9), every=3, memory={"every": 4}, ckpt_path=tmp_path / "c")[1] == 9
    fit(tmp_path / "2", Crash(9), every=4, memory={"every": 4})
    (tmp_path / "2" / "c" / "step-00000008" / "state.json").write_bytes(b"")  # of equal age, memory is read
    assert fit(tmp_path / "2", every=3, ckpt_path=tmp_path / "2" / "c")[1] == 8


def test_only_copies_of_this_run_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: leftovers of an earlier run in the same folder, or of another recipe, are taken up; a run that is started
    anew goes on by itself; a given checkpoint is overruled."""
    fit(tmp_path, Crash(9))
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path, saved)

    def again(**options: Any) -> int:
        for name in ("c", "memory"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(saved / name, tmp_path / name)
        return fit(tmp_path, Crash(9), **options)[1]

    assert again() == 0  # nothing says that it is a restart
    steps = [each.name for each in kept(tmp_path)]
    assert again(ckpt_path=tmp_path / "c" / "step-00000001") == 1
    monkeypatch.setattr("stabletrain_plugins.save_checkpoints.callback.recipe_hash", lambda *_, **__: "other")
    assert again(ckpt_path=tmp_path / "c") == 8  # the recipe of the copy is not known
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert again() == 8
    assert again(ckpt_path=tmp_path / "c" / "step-00000001") == 8  # the newest one: what a restarted script finds
    shutil.rmtree(saved / "c")
    fit(tmp_path / "other", Crash(3))
    shutil.copytree(tmp_path / "other" / "c", saved / "c")
    assert again() == 1  # the checkpoints on disk are of another run
    assert steps == ["step-00000006", "step-00000008"]


def test_copies_of_another_recipe_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: copies of before a change of the recipe are taken up."""
    recipe = "stabletrain_plugins.save_checkpoints.callback.recipe_hash"
    monkeypatch.setattr(recipe, lambda *_, **__: "one")
    fit(tmp_path, Crash(9))
    monkeypatch.setattr(recipe, lambda *_, **__: "other")
    assert fit(tmp_path, Crash(3), ckpt_path=tmp_path / "c")[1] == 1


def test_a_damaged_copy_is_as_good_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: the run ends, or starts from scratch, although there is an older copy, or one on the disk."""
    fit(tmp_path, Crash(9))
    shutil.copytree(tmp_path, tmp_path / "saved")
    file = kept(tmp_path)[-1] / "tensors-00000-of-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert fit(tmp_path, Crash(9), ckpt_path=tmp_path / "c")[1] == 6
    assert "damaged copies in memory are not used" in caplog.text
    for each in kept(tmp_path):
        (each / "manifest.json").unlink()
    assert fit(tmp_path, ckpt_path=tmp_path / "c")[1] == 1


@pytest.mark.parametrize("error", [TrainingStopped, RuntimeError])
def test_copies_are_removed_when_nobody_goes_on(tmp_path: Path, error: type[BaseException]) -> None:
    """Bug: a run that a plugin has stopped leaves its copies in memory; a crashed one has none to go on from."""
    fit(tmp_path, Crash(5, error))
    assert len(kept(tmp_path)) == (0 if error is TrainingStopped else 2)


LOCKS = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


def test_two_runs_share_a_memory_folder_but_not_a_folder_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs: the copies of a live run are deleted or mixed with another's; those of a dead one stay for ever."""
    monkeypatch.setattr(Place.lock, "__defaults__", (0.2,))
    place = Place(tmp_path / "memory", tmp_path / "c", 0)
    place.make()
    there = place.node
    (there / "lock").touch()
    with subprocess.Popen([sys.executable, "-S", "-c", LOCKS, str(there / "lock")], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(UserError, match="another run that is alive"):
                fit(tmp_path)
            old = there.stat().st_mtime - 7200
            os.utime(there / "lock", (old, old))
            os.utime(there, (old, old))
            fit(tmp_path / "else", memory={"folder": str(tmp_path / "memory")})
            assert there.exists()
        finally:
            other.kill()
    os.utime(there / "lock")
    fit(tmp_path / "else", memory={"folder": str(tmp_path / "memory")})
    assert there.exists()  # it may be between two attempts
    os.utime(there / "lock", (old, old))
    os.utime(there, (old, old))
    fit(tmp_path / "else", memory={"folder": str(tmp_path / "memory")})
    assert not there.exists()


def test_too_little_memory_is_refused_before_training_and_not_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bugs: found out when the file system is full; a run that had started is ended for it."""
    fit(tmp_path / "1", Crash(5))
    small = os.statvfs_result((4096, 4096, *[0] * 8))
    monkeypatch.setattr(capacity.os, "statvfs", lambda _: small)
    with pytest.raises(UserError, match=r"has room for 0 B, and the copies of this node take .*--shm-size"):
        fit(tmp_path / "2")
    assert fit(tmp_path / "1", ckpt_path=tmp_path / "1" / "c")[1] == 4
    assert "this run goes on without copies in memory: " in caplog.text


@pytest.mark.parametrize(
    ("memory", "word"),
    [
        ({"evry": 3}, "memory has no option 'evry'; expected every, folder, copies; did you mean 'every'"),
        ({"every": 0}, "memory.every must be applied steps >= 1"),
        ({"every": True}, r"memory.every"),
        ({"every": "10min"}, r"memory.every"),
        ({"copies": 0}, r"memory.copies must be a number of nodes >= 1"),
        ({"folder": ""}, r"memory.folder must be a path"),
        (50, "memory must be a mapping"),
    ],
)
def test_options_out_of_range_are_refused(memory: Any, word: str) -> None:
    """Bugs: a misspelt option without effect; an interval that nothing is ever copied at."""
    with pytest.raises(UserError, match=word):
        SaveCheckpoints(memory=memory)


def test_a_folder_that_others_can_open_is_refused(tmp_path: Path) -> None:
    """Bugs: a folder or link that another user has made in /dev/shm is written to; more nodes than there are."""
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / f"stabletrain-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(UserError, match="not a folder that only this user can open"):
        fit(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        fit(tmp_path, memory={"folder": str(tmp_path / "file")})
    with pytest.raises(UserError, match=r"memory\.copies must be at most 1 on 1 nodes, got 2"):
        fit(tmp_path / "2", memory={"copies": 2})


def test_an_automatic_interval_changes_no_bit(tmp_path: Path) -> None:
    """Bugs: no copy at all; the copies change the run."""
    whole, _ = fit(tmp_path / "1", memory={"every": None}, max_steps=14)
    fit(tmp_path / "2", Crash(13), memory={"every": "auto"}, max_steps=14)
    assert [each.name for each in kept(tmp_path / "2")] == ["step-00000010"]
    end, start = fit(tmp_path / "2", memory={"every": "auto"}, ckpt_path=tmp_path / "2" / "c", max_steps=14)
    assert start == 10
    assert torch.equal(end["module.net.0.weight"], whole["module.net.0.weight"])
    assert_same(end, whole)


def test_copies_are_found_if_reading_was_prepared_before(tmp_path: Path) -> None:
    """Bug: the launcher lets the Trainer read checkpoints before the plugin does, and copies are never looked at."""
    fit(tmp_path, Crash(9))
    start = Start()
    saver = SaveCheckpoints(tmp_path / "c", every=None, memory={"every": 2, "folder": str(tmp_path / "memory")})
    mine = fits.trainer(ResumeExactly(), saver, start, max_steps=10, max_epochs=-1)
    check_when_reading(mine)
    fits.run(mine, Net(dropout=0.1), batches(*[HEALTHY] * 16), ckpt_path=tmp_path / "c")
    assert start.step == 8
