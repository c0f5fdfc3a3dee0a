"""What a full disk may do to a file of lines."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest

from stabletrain.runtime.records.json_lines import JsonLines


def test_lines_that_a_full_disk_refuses_are_written_later_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # catches a record that ends with the first full disk, half a line in the middle, and a warning for every line
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path, "events")
    lines.append("first")
    whole = Path.open

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        with whole(self, *args, **kwargs) as file:
            file.write("sec")
        raise OSError(errno.ENOSPC, "No space left on device")

    with caplog.at_level(logging.WARNING, "stabletrain"):
        with monkeypatch.context() as disk:
            disk.setattr(Path, "open", full)
            lines.append("second")
            lines.append("third")
        assert path.read_text() == "first\n"
        lines.append("fourth")
    assert path.read_text() == "first\nsecond\nthird\nfourth\n"
    assert caplog.text.count("events cannot be written") == 1


def test_without_a_path_nothing_is_kept() -> None:
    # catches memory that grows on every rank but the first
    lines = JsonLines(None, "events")
    lines.append("a")
    assert not lines._waiting
