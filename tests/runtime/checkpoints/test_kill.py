"""SIGKILL at random moments of saving: whatever was acknowledged can be read, and nothing unreadable has a name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with TMPDIR on another file system, where a move is a copy that a kill can cut short."""
    elsewhere = Path("/dev/shm") / f"stabletrain-{os.getpid()}"
    other = elsewhere if Path("/dev/shm").is_dir() else tmp_path / "elsewhere"
    other.mkdir()
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("kill_children.py")), str(tmp_path / "checkpoints"), "50"],
            env={**os.environ, "TMPDIR": str(other), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        counts = json.loads(done.stdout)
        assert counts["lost"] == 0
        assert counts["saves"] >= 50
        assert counts["torn"] > 0, "no kill hit a write: the test proves nothing"
        assert os.listdir(other) == []
        with capsys.disabled():
            print(f"\n50 SIGKILLs in {counts['saves']} saves, {counts['torn']} torn writes: 0 acknowledged ones lost")
    finally:
        for path in (*other.iterdir(), other):
            path.unlink() if path.is_file() else path.rmdir()
