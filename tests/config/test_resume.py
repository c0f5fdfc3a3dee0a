"""The config key ``resume``: which checkpoint it means, and what is said of one that cannot be resumed from."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stabletrain.config.resume import checkpoint_of, checkpoint_of_run, resume_problem
from stabletrain.runtime.checkpoints import CheckpointInfo, Saver, Store


def verified(folder: Path) -> Path:
    saver = Saver(Store(folder))
    saver.save({"weights": torch.ones(3)}, CheckpointInfo(step=1, run="a"), wait=True)
    assert saver.newest is not None
    return saver.newest


@pytest.mark.parametrize(
    ("resume", "problem"),
    [
        ("/no/such.ckpt", "there is no checkpoint at '/no/such.ckpt'"),
        ("https://example.com/x.ckpt", "expected a path, got the URL"),
        ("s3://bucket/x.ckpt", "expected a path, got the URL"),
        ("x" * 5000, "there is no checkpoint"),
        ("a\0b", "there is no checkpoint"),
        ("~nobody-of-this-name/x", "there is no checkpoint"),
        ("/", "the folder / is no checkpoint and holds none"),
        ("/dev/null", "is a device"),
        ("/proc/version", "is not a checkpoint"),
        ("", "is no checkpoint and holds none"),
    ],
)
def test_what_is_no_checkpoint(resume: str, problem: str) -> None:
    """Bug: an exception of the file system's, or a config that is accepted and dies in the worker."""
    assert problem in (resume_problem(resume) or "")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (os.mkfifo, "is a named pipe"),
        (lambda path: path.write_bytes(pickle.dumps(3)), "is a pickle"),
        (lambda path: path.write_text("x"), "is not a checkpoint"),
        (lambda path: torch.save({"x": 1}, path), None),
        (lambda path: path.symlink_to(path), "there is no checkpoint"),
    ],
)
def test_a_file(make: Callable[[Path], object], problem: str | None, tmp_path: Path) -> None:
    """Bug: a pipe hangs the worker; a pickle is found only there."""
    make(tmp_path / "x.ckpt")
    found = resume_problem(str(tmp_path / "x.ckpt"))
    assert found is None if problem is None else problem in (found or "")


def test_verified_checkpoints(tmp_path: Path) -> None:
    """Bug: a folder in which every checkpoint is damaged is accepted, or one with a good one is not."""
    path = verified(tmp_path / "run" / "checkpoints")
    for each in (tmp_path / "run", path.parent, path):
        assert resume_problem(str(each)) is None
    other = shutil.copytree(path, path.with_name("step-00000009"))
    (other / "state.json").write_text("x")
    assert resume_problem(str(other)) is None  # the other one is read instead
    (path / "manifest.json").write_text("{}")
    problem = resume_problem(str(tmp_path / "run")) or ""
    assert problem.startswith("step-00000009 in ")
    assert "state.json has 1 bytes" in problem


def test_the_newest_file_is_a_file(tmp_path: Path) -> None:
    """Bug: a pipe called ``*.ckpt`` is the newest checkpoint of a run."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"x": 1}, folder / "good.ckpt")
    os.mkfifo(folder / "pipe.ckpt")
    assert checkpoint_of(str(tmp_path)) == folder / "good.ckpt"


def test_a_truncated_file_is_not_the_one_to_resume_from(tmp_path: Path) -> None:
    """Bugs: after a full disk the summary suggests the truncated file; if there is no other, nobody says why."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"x": 1}, folder / "good.ckpt")
    cut = folder / "later.ckpt"
    cut.write_bytes((folder / "good.ckpt").read_bytes()[:-30])
    os.utime(folder / "good.ckpt", (1, 1))
    assert checkpoint_of_run(tmp_path) == folder / "good.ckpt"
    assert resume_problem(str(tmp_path)) is None
    (folder / "good.ckpt").unlink()
    assert checkpoint_of_run(tmp_path) is None
    assert "later.ckpt is not a checkpoint, or is truncated" in str(resume_problem(str(tmp_path)))


def test_a_folder_of_a_sharded_strategy(tmp_path: Path) -> None:
    """Bug: what FSDP or DeepSpeed wrote is refused."""
    (tmp_path / ".metadata").touch()
    assert resume_problem(str(tmp_path)) is None
