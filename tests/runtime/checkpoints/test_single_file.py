"""Lightning's checkpoint files are read as data only, and what is anything else is one sentence."""

import os
import pickle
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from stabletrain.runtime.checkpoints import CheckpointError
from stabletrain.runtime.checkpoints.archive import file_problem
from stabletrain.runtime.checkpoints.lightning_io import check_when_reading
from stabletrain.runtime.checkpoints.single_file import load_file
from stabletrain.testing.toy import ToyBatches, ToyModule
from stabletrain.testing.trainer import quiet_trainer


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def zipped(path: Path, names: tuple[str, ...], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names:
            archive.writestr(name, bytes(1000))


def cut(path: Path) -> None:
    torch.save({"x": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def scripted(path: Path) -> None:
    zipped(path, ("a/data.pkl", "a/constants.pkl"))


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Hostile(path.with_name("ran")))), "is a pickle"),
    "old format": (lambda path: torch.save({"x": 1}, path, _use_new_zipfile_serialization=False), "is a pickle"),
    "object": (lambda path: torch.save({"x": Hostile(path.with_name("ran"))}, path), "an object of posix.system"),
    "list": (lambda path: torch.save([1], path), "holds a list"),
    "empty": (lambda path: path.touch(), "is not a checkpoint"),
    "text": (lambda path: path.write_text("x"), "is not a checkpoint"),
    "cut": (cut, "is truncated"),
    "other zip": (lambda path: zipped(path, ("a.txt",)), "without a data.pkl"),
    "leads outside": (lambda path: zipped(path, ("../data.pkl",)), "leads out"),
    "compressed": (lambda path: zipped(path, ("a/data.pkl",), zipfile.ZIP_DEFLATED), "is compressed"),
    "TorchScript": (scripted, "TorchScript"),
    "empty data": (lambda path: zipped(path, ("a/data.pkl",)), "cannot be read as a checkpoint|holds Python objects"),
    "pipe": (os.mkfifo, "is a named pipe"),
    "socket": (listening, "is a socket"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "loop": (lambda path: path.symlink_to(path), "cannot be read"),
    "missing": (lambda path: None, "cannot be read"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_checkpoint_is_one_sentence(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: code runs, the process waits for ever, or an exception of torch's, zipfile's or pickle's."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make, problem = FILES[kind]
    make(Path("x.ckpt"))
    with pytest.raises(CheckpointError, match=problem) as error:
        load_file("x.ckpt")
    assert "\n" not in str(error.value)
    assert not Path("ran").exists()


def test_overlapping_entries(tmp_path: Path) -> None:
    """Bug: a small file whose entries announce more bytes than it has fills the memory."""
    path = tmp_path / "x.ckpt"
    zipped(path, ("a/data.pkl", "a/data/0"))
    raw = path.read_bytes()
    path.write_bytes(raw.replace((1000).to_bytes(4, "little"), (2**31).to_bytes(4, "little")))
    assert file_problem(path) == "is damaged: its entries are larger than the file"


@pytest.mark.parametrize("kind", ["pickle", "object", "list", "cut", "pipe"])
def test_in_a_trainer(kind: str, tmp_path: Path) -> None:
    """Bug: a traceback, or ``resume`` is not named."""
    path = tmp_path / "x.ckpt"
    make, problem = FILES[kind]
    make(path)
    trainer = quiet_trainer(max_steps=1)
    check_when_reading(trainer)
    with pytest.raises(CheckpointError, match=rf"resume: {path}: it .*{problem}.*\(config key resume\)"):
        trainer.fit(ToyModule(), ToyBatches(), ckpt_path=path)
    assert not (tmp_path / "ran").exists()


def test_a_sharded_folder_says_how_to_convert_it(tmp_path: Path) -> None:
    """Bug: the message of torch.load for a folder, when a run at one process resumes from Lightning's sharded form."""
    path = tmp_path / "x.ckpt"
    path.mkdir()
    (path / "meta.pt").touch()
    trainer = quiet_trainer(max_steps=1)
    check_when_reading(trainer)
    with pytest.raises(CheckpointError, match=r"resume: .*sharded checkpoint of Lightning.*consolidate_checkpoint"):
        trainer.fit(ToyModule(), ToyBatches(), ckpt_path=path)


def test_a_url_is_read_as_data_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: Lightning reads URLs with ``weights_only=False``: whoever serves them runs code."""
    seen: list[Any] = []

    def load(self: Any, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        seen.append(weights_only)
        return {}

    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", load)
    trainer = quiet_trainer(max_steps=1)
    check_when_reading(trainer)
    with pytest.raises(CheckpointError, match="pytorch-lightning_version"):
        trainer.fit(ToyModule(), ToyBatches(), ckpt_path="https://example.com/x.ckpt")
    assert seen == [True]


def test_a_good_file_and_a_link_to_it(tmp_path: Path) -> None:
    """Bug: the checks refuse what Lightning writes, or its link ``last.ckpt``."""
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(ToyModule(), ToyBatches())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "last.ckpt").symlink_to("x.ckpt")
    shutil.copy(tmp_path / "x.ckpt", tmp_path / "copy.ckpt")
    assert load_file(tmp_path / "last.ckpt")["global_step"] == load_file(tmp_path / "copy.ckpt")["global_step"] == 1
