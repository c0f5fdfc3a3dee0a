"""A resumed run has the whole record of steps."""

from pathlib import Path

import pytest

from stabletrain.launch.earlier_steps import take_over_events, take_over_steps


def test_the_record_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: steps that are made again are copied, so that a run which ends before has them; the record of a run is
    found for one form of ``resume`` only; a requeued job loses what it has recorded; a link in a run's folder from
    elsewhere makes any file an artifact; a disk that fails ends the run."""
    earlier, mine = tmp_path / "earlier", tmp_path / "mine"
    (earlier / "checkpoints" / "step-1").mkdir(parents=True)
    (earlier / "checkpoints" / "a.ckpt").touch()
    mine.mkdir()
    target = mine / "steps.bin"

    def resume(path: Path | None) -> bytes | None:
        take_over_steps({"run_dir": str(mine), "resume": None if path is None else str(path)}, 2)
        assert [each.name for each in mine.iterdir()] in ([], ["steps.bin"])
        return target.read_bytes() if target.exists() else None

    (earlier / "steps.bin").write_bytes(b"1" * 34 + b"3" * 17)
    assert resume(earlier / "checkpoints") is None  # the folder is that of no run
    (earlier / "run.yaml").touch()
    for path in (earlier / "checkpoints", earlier / "checkpoints" / "step-1", earlier / "checkpoints" / "a.ckpt"):
        assert resume(path) == b"1" * 34
        target.write_bytes(b"2")
        assert resume(path) == b"2"
        target.unlink()
    assert resume(None) is None
    assert resume(tmp_path / "no such" / "a.ckpt") is None

    (earlier / "steps.bin").rename(tmp_path / "secret")
    (earlier / "steps.bin").symlink_to(tmp_path / "secret")
    assert resume(earlier / "checkpoints") is None
    (earlier / "steps.bin").unlink()
    (earlier / "steps.bin").mkdir()
    assert resume(earlier / "checkpoints") is None
    (earlier / "steps.bin").rmdir()
    (earlier / "steps.bin").write_bytes(b"1")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    take_over_steps({"run_dir": str(mine), "resume": str(earlier / "checkpoints")}, 2)
    assert not target.exists()


def test_events_before_the_resume_are_kept(tmp_path: Path) -> None:
    """Bugs: a resumed run's report knows only the events since; those of steps that are made again count twice; a link
    in a run's folder from elsewhere makes any file an artifact."""
    earlier, own = tmp_path / "earlier.jsonl", tmp_path / "events.jsonl"
    take_over_events(earlier, own, 5)
    assert not own.exists()
    earlier.write_text('{"step": 2, "kind": "skip"}\n{"kind": "skip"}\n{"step": 5, "kind": "skip"}\nno event')
    own.write_text('{"step": 6, "kind": "spike"}\n')
    take_over_events(earlier, own, 5)
    assert own.read_text() == '{"step": 2, "kind": "skip"}\n{"step": 6, "kind": "spike"}\n'
    own.unlink()
    earlier.rename(tmp_path / "secret")
    earlier.symlink_to(tmp_path / "secret")
    take_over_events(earlier, own, 5)
    assert not own.exists()
