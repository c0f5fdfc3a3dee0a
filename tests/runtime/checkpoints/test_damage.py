"""Every damage is found, and the previous good checkpoint is read instead of the damaged one, with a warning."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest

from stabletrain.runtime.checkpoints import CheckpointError, Manifest, Retention, load, newest, verify

from .conftest import Write, save

FILES = ("manifest.json", "state.json", "tensors.safetensors")


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def check_fallback(tmp_path: Path, damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Verifying fails; by its own path and by the folder's, the previous one is read, and a warning names both."""
    with pytest.raises(CheckpointError):
        verify(damaged)
    for path in (damaged, tmp_path, tmp_path / "last"):
        caplog.clear()
        assert load(path)["step"] == 1
        assert "step-00000002 is damaged" in caplog.text
        assert "step-00000001" in caplog.text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "longer", "missing"])
def test_a_damaged_file(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str) -> None:
    """Bug: damage of some kind, in some file, is loaded; or it ends the resume although an older one is good."""
    write(1)
    file = write(2) / name
    size = file.stat().st_size
    if damage == "flip":
        flip(file, size * 4)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "longer":
        file.write_bytes(file.read_bytes() + b"\n")
    else:
        file.unlink()
    check_fallback(tmp_path, file.parent, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_random_flips_and_cuts(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Bug: a byte that no checksum covers."""
    write(1)
    file = write(2) / name
    good = file.read_bytes()
    generator = random.Random(0)
    for _ in range(200):
        file.write_bytes(good)
        flip(file, generator.randrange(len(good) * 8))
        check_fallback(tmp_path, file.parent, caplog)
        file.write_bytes(good[: generator.randrange(len(good))])
        check_fallback(tmp_path, file.parent, caplog)
    file.write_bytes(good)
    assert load(tmp_path)["step"] == 2
    with capsys.disabled():
        print(f"\n{name}: 200 of 200 flipped bits and 200 of 200 truncations noticed, the previous one loaded")


def test_bits_all_over_a_manifest(write: Write) -> None:
    """Bug: a changed step or sequence is believed, because only the other files have a checksum."""
    path = write(1)
    file = path / "manifest.json"
    for bit in range(0, file.stat().st_size * 8, 11):
        flip(file, bit)
        with pytest.raises(CheckpointError):
            Manifest.read(path)
        flip(file, bit)
    verify(path)


def test_nothing_good_is_an_error_that_names_everything(write: Write, tmp_path: Path) -> None:
    """Bug: training starts from the beginning, or the message names one of the damaged checkpoints only."""
    for step in (1, 2):
        (write(step) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged: state.json is missing.*step-00000001"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="there is none"):
        load(tmp_path / "elsewhere")


def test_an_older_one_asked_for_is_never_replaced_by_a_later_one(write: Write, tmp_path: Path) -> None:
    """Bug: instead of a damaged checkpoint that the user named, a later one is loaded."""
    first, second, third = write(1), write(2), write(3)
    (second / "state.json").unlink()
    assert load(second)["step"] == 1
    (first / "manifest.json").unlink()
    with pytest.raises(CheckpointError):
        load(second)
    assert load(third)["step"] == 3


def test_another_runs_checkpoint_is_never_read_instead(write: Write, tmp_path: Path) -> None:
    """Bug: the fallback loads the weights of another run."""
    write(1, run="other")
    path = write(2, run="mine")
    (path / "tensors.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is missing"):
        load(tmp_path)


def test_newest_is_the_one_written_last_not_the_highest_step(write: Write, tmp_path: Path) -> None:
    """After a rollback the steps continue from a lower one, and the later checkpoints are of a past that was undone."""
    write(100)
    again = write(50)
    assert newest(tmp_path) == again
    assert load(tmp_path)["step"] == 50
    (again / "state.json").unlink()
    assert newest(tmp_path) is not None
    assert load(tmp_path)["step"] == 100


def test_a_half_written_one_is_never_seen(write: Write, tmp_path: Path) -> None:
    """Bug: a folder that is still written, or is being deleted, counts as a checkpoint."""
    path = write(1)
    shutil.copytree(path, tmp_path / ".writing-step-00000002-host-1")
    shutil.copytree(path, tmp_path / ".deleted-step-00000000-host-1")
    assert newest(tmp_path) == path
    assert load(tmp_path)["step"] == 1


def test_a_moved_or_copied_checkpoint_can_be_read(write: Write, tmp_path: Path) -> None:
    """Bug: a checkpoint depends on its path or name."""
    copy = shutil.copytree(write(7), tmp_path / "elsewhere" / "the-good-one")
    assert load(copy)["step"] == 7


def test_a_format_of_the_future_is_named(write: Write) -> None:
    """Bug: a checkpoint of a newer version counts as damaged."""
    from stabletrain.runtime.checkpoints.manifest import _signed

    file = write(1) / "manifest.json"
    content = json.loads(file.read_bytes())
    del content["checksum"]
    file.write_bytes(_signed({**content, "format": 3}))
    with pytest.raises(CheckpointError, match=r"format 3.*update"):
        verify(file.parent)


def test_the_folder_of_a_run_is_as_good_as_that_of_its_checkpoints(tmp_path: Path) -> None:
    """Bug: ``resume=RUN_FOLDER`` finds nothing."""
    save(tmp_path / "checkpoints", 3, retention=Retention())
    assert load(tmp_path)["step"] == 3


def test_good_checkpoints_are_loaded_without_warnings(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a warning about damage where there is none."""
    write(1)
    write(2)
    with caplog.at_level(logging.DEBUG):
        load(tmp_path)
    assert caplog.text == ""
