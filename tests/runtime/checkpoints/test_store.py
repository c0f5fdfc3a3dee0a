"""What is retained and deleted, and what happens when the disk cannot be written."""

import errno
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stabletrain.runtime.checkpoints import CheckpointInfo, Retention, Saver, Store, load, newest
from stabletrain.runtime.checkpoints import durable as durable_module
from stabletrain.runtime.checkpoints.newest_file import newest_files

from .conftest import Write, content, save


def steps(folder: Path) -> list[int]:
    return [entry.manifest.info.step for entry in Store(folder).entries()]


def test_the_newest_are_retained(tmp_path: Path) -> None:
    """Bug: older checkpoints fill the disk, or the newest are the ones deleted."""
    for step in range(1, 6):
        save(tmp_path, step, retention=Retention(last=2))
    assert steps(tmp_path) == [4, 5]
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_the_best_is_retained_too(tmp_path: Path, mode: Any, best: int) -> None:
    """Bug: the best one is deleted, or ``mode`` is exchanged."""
    retention = Retention(last=1, metric="val_loss", mode=mode)
    for step, value in ((1, 1.0), (2, 0.5), (3, 2.0), (4, 1.5)):
        save(tmp_path, step, retention=Retention(last=None), metric="val_loss", value=value)
    save(tmp_path, 5, retention=retention)
    assert steps(tmp_path) == [best, 5]


def test_a_nan_is_never_the_best(tmp_path: Path) -> None:
    """Bug: a NaN counts as better than every number, or an equal value replaces the best."""
    saver = Saver(Store(tmp_path, Retention(metric="m")))
    assert not saver.is_best("a", float("nan"))
    assert saver.is_best("a", 1.0)
    saver.save(content(1), CheckpointInfo(step=1, run="a", metric="m", value=1.0))
    assert not saver.is_best("a", 1.0)
    assert not saver.is_best("a", float("nan"))
    assert saver.is_best("a", 0.5)


def test_one_that_is_not_whole_is_the_last_choice_and_does_not_count_as_retained(tmp_path: Path) -> None:
    # catches a run that resumes inexactly though an exact checkpoint is there, or that deletes the exact one
    retention = Retention(last=1, metric="m")
    for step, whole, value in ((1, True, None), (2, False, 1.0), (3, True, None), (4, False, 2.0), (5, False, 0.5)):
        save(tmp_path, step, retention=retention, whole=whole, metric=None if value is None else "m", value=value)
    assert steps(tmp_path) == [3, 5]
    assert newest(tmp_path) == tmp_path / "step-00000003"
    assert load(tmp_path)["step"] == 3
    assert load(tmp_path / "step-00000005")["step"] == 5, "it is read where it is named"
    shutil.rmtree(tmp_path / "step-00000003")
    assert load(tmp_path)["step"] == 5, "better than none"


def test_other_runs_checkpoints_are_not_deleted(tmp_path: Path) -> None:
    """Bug: a new run in the same folder deletes the checkpoints of the one before."""
    save(tmp_path, 900, run="old", retention=Retention(last=1))
    for step in (1, 2, 3):
        save(tmp_path, step, run="new", retention=Retention(last=1))
    assert steps(tmp_path) == [900, 3]


def test_a_damaged_one_does_not_count_as_retained(tmp_path: Path) -> None:
    """Bug: a good checkpoint is deleted in favour of a damaged one."""
    first = save(tmp_path, 1, retention=Retention(last=2))
    (save(tmp_path, 2, retention=Retention(last=2)) / "manifest.json").unlink()
    save(tmp_path, 3, retention=Retention(last=2))
    assert first.exists()


def test_the_same_step_twice_makes_two(write: Write, tmp_path: Path) -> None:
    """A step that was skipped leaves the step count where it was, and the data position elsewhere."""
    assert [write(5).name, write(5).name, write(5).name] == ["step-00000005", "step-00000005-2", "step-00000005-3"]
    assert newest(tmp_path) == tmp_path / "step-00000005-3"


def test_nothing_is_deleted_before_the_new_one_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's asynchronous save with save_top_k=1 can leave no checkpoint at all."""
    order: list[str] = []

    def spied(name: str) -> Any:
        real = getattr(durable_module, name)

        def spy(*args: Any) -> Any:
            done = real(*args)
            order.append(name)
            return done

        return spy

    for name in ("write_file", "publish", "discard"):
        monkeypatch.setattr(durable_module, name, spied(name))
    save(tmp_path, 1, retention=Retention(last=1))
    order.clear()
    save(tmp_path, 2, retention=Retention(last=1))
    assert order == ["write_file", "write_file", "publish", "discard"]


def test_every_file_and_folder_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: after a power failure, a published checkpoint has empty files."""
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    save(tmp_path, 1)
    names = [Path(each).name for each in synced]
    assert names[:3] == ["tensors.safetensors", "state.json", "manifest.json"]
    assert names[3].startswith(".writing-step-00000001")
    assert names[4] == tmp_path.name


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("wait", [True, False])
def test_a_failed_write_is_reported_each_time_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int, wait: bool
) -> None:
    """Bug: a full disk ends the run, deletes the older checkpoint, or is reported once only."""
    saver = Saver(Store(tmp_path, Retention(last=1)))
    saver.save(content(1), CheckpointInfo(step=1, run="a"), wait=True)
    real = durable_module.write_file

    def refuse(path: Path, chunks: Any) -> Any:
        path.write_bytes(next(iter(chunks))[:10])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(durable_module, "write_file", refuse)
    for step in (2, 3):
        saver.save(content(step), CheckpointInfo(step=step, run="a"), wait)
    saver.wait()
    assert caplog.text.count(os.strerror(code)) == 2
    assert "step-00000001" in caplog.text
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert load(tmp_path)["step"] == 1
    monkeypatch.setattr(durable_module, "write_file", real)
    saver.save(content(4), CheckpointInfo(step=4, run="a"), wait=True)
    assert load(tmp_path)["step"] == 4


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """A real one: a file system of 1 MB, with checkpoints of 400 kB of which three would have to fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here: that needs root")
    try:
        saver = Saver(Store(disk / "checkpoints", Retention(last=2)))
        refused = 0
        for step in range(1, 6):
            saver.save({"step": step, "w": torch.full((100_000,), float(step))}, CheckpointInfo(step=step, run="a"))
            saver.wait()
            good = load(disk)
            assert good["w"].eq(good["step"]).all()
            refused += good["step"] != step
        assert good["step"] == 2
        assert refused == 3
        assert caplog.text.count("No space left on device") == 2, "of the failures in a row, the 1st, 2nd, 4th ..."
        assert "(failure 2 in a row)" in caplog.text
        assert sorted(os.listdir(disk / "checkpoints")) == ["step-00000001", "step-00000002"]
        shutil.rmtree(disk / "checkpoints" / "step-00000001")
        saver.save({"step": 6, "w": torch.full((100_000,), 6.0)}, CheckpointInfo(step=6, run="a"), wait=True)
        assert load(disk)["step"] == 6
        with capsys.disabled():
            print(
                f"\nfull disk: {refused} of 5 writes refused and reported, older ones intact, written again with room"
            )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_may_not_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a folder that cannot be made ends the run."""
    file = tmp_path / "file"
    file.write_text("")
    saver = Saver(Store(file / "checkpoints"))
    saver.save(content(1), CheckpointInfo(step=1, run="a"), wait=True)
    assert "could not be written" in caplog.text
    assert "there is none yet" in caplog.text


def test_at_most_one_write_at_a_time_and_every_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: two writes at once take twice the memory; or a save during a write is dropped."""
    busy, most = 0, 0
    lock = threading.Lock()
    real = Store.write

    def write(self: Store, *args: Any) -> Path:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        try:
            return real(self, *args)
        finally:
            with lock:
                busy -= 1

    monkeypatch.setattr(Store, "write", write)
    saver = Saver(Store(tmp_path, Retention(last=None)))
    for step in range(1, 21):
        saver.save(content(step), CheckpointInfo(step=step, run="a"))
    saver.wait()
    assert most == 1
    assert steps(tmp_path) == list(range(1, 21))


def test_incomplete_folders_of_dead_processes_are_removed(tmp_path: Path) -> None:
    host = os.uname().nodename
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [f".writing-step-00000001-{host}-{dead.pid}", f".deleted-step-00000002-{host}-{dead.pid}"]
    alive = [f".writing-step-00000003-{host}-{os.getpid()}", ".writing-step-00000004-otherhost-1", "mine"]
    for name in (*names, *alive):
        (tmp_path / name).mkdir()
    before = psutil.Process().create_time() - 1.0
    old = tmp_path / ".writing-step-00000005-otherhost-1"
    old.mkdir()
    os.utime(old, (0, 0))
    # a container that was restarted: the number is this process's, the folder is older than it
    reused = tmp_path / f".writing-step-00000006-{host}-{os.getpid()}"
    reused.mkdir()
    os.utime(reused, (before, before))
    Store(tmp_path).sweep()
    assert sorted(os.listdir(tmp_path)) == sorted(alive)


def test_a_write_in_flight_survives_the_end_of_the_process(tmp_path: Path) -> None:
    """Bug: the last checkpoint is lost, because the process ends before the background write."""
    code = (
        "import sys, torch; from pathlib import Path; from stabletrain.runtime.checkpoints import *\n"
        "Saver(Store(Path(sys.argv[1]))).save({'w': torch.ones(5_000_000)}, CheckpointInfo(step=1, run='a'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert load(tmp_path)["w"].sum().item() == 5_000_000


def test_no_file_is_given_to_pickle(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may come from anywhere, and a pickle can run code."""
    path = write(1)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert load(path)["step"] == 1


def test_newest_files_are_by_time_and_found_without_torch(tmp_path: Path) -> None:
    """Bugs: order by name, where step=9 comes after step=10; a file deleted meanwhile; seconds of import for a list."""
    for age, name in enumerate(("step=10.ckpt", "step=9.ckpt", "last.ckpt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100 - age, 100 - age))
    (tmp_path / "other.txt").touch()
    (tmp_path / "gone.ckpt").symlink_to(tmp_path / "nowhere")
    code = (
        "import sys; from pathlib import Path; from stabletrain.runtime.checkpoints.newest_file import newest_files\n"
        "print([path.name for path in newest_files(Path(sys.argv[1]))], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['step=10.ckpt', 'step=9.ckpt', 'last.ckpt'] False"
    assert newest_files(tmp_path / "missing") == []
