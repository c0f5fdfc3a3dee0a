"""What a full disk, a kill, another process and damage may do to a file of lines."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stabletrain.runtime.records.json_lines import CUT, JsonLines, read_lines


def test_lines_that_a_full_disk_refuses_are_written_later_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # catches a record that ends with the first full disk, half a line in the middle, and a warning for every line
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path, "events")
    lines.append("first")
    whole = os.write

    def full(descriptor: int, content: bytes) -> int:
        if content.startswith(b"sec"):
            return whole(descriptor, content[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with caplog.at_level(logging.WARNING, "stabletrain"):
        with monkeypatch.context() as disk:
            disk.setattr(os, "write", full)
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


RECORD = '{"step": 1, "text": "ü"}'


def records(path: Path) -> list[object]:
    return [line.record for line in read_lines(path)]


@pytest.mark.parametrize("cut", range(1, len(RECORD.encode()) + 1))
def test_a_line_that_was_cut_anywhere_is_marked_and_the_next_is_whole(tmp_path: Path, cut: int) -> None:
    # catches a record that is glued to the line which a kill left incomplete
    path = tmp_path / "lines.jsonl"
    before = b'{"step": 0}\n' + RECORD.encode()[:cut]
    path.write_bytes(before)
    JsonLines(path, "events").append('{"step": 2}')
    whole = cut == len(RECORD.encode())
    assert path.read_bytes() == before + (b"" if whole else CUT.encode()) + b'\n{"step": 2}\n'
    assert records(path) == [{"step": 0}, {"step": 1, "text": "ü"} if whole else None, {"step": 2}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b'\n \n{"a": 1}\n\n', [{"a": 1}]),
        (b'{"a": 1}\r\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        (b'{"a": 1}\n' + b"\0" * 5000 + b'{"a": 2}\n', [{"a": 1}, None, {"a": 2}]),
        (b'{"a": 1}\n' + b"\0" * 5000, [{"a": 1}, None]),
        (b'{"a": "\xff"}\n{"a": 2}\n', [None, {"a": 2}]),
        (b'1\nnull\n[]\n"a"\n{"a": 2}\n', [None] * 4 + [{"a": 2}]),
        (b"[" * 100_000 + b'\n{"a": 2}\n', [None, {"a": 2}]),
        (b'{"a": ' + b"1" * 5000 + b'}\n{"a": 2}\n', [None, {"a": 2}]),
        ('{"a": "\u2028\x85"}\n'.encode(), [{"a": "\u2028\x85"}]),
    ],
)
def test_what_else_may_stand_in_a_file(tmp_path: Path, content: bytes, expected: list[object]) -> None:
    # catches a traceback, or whole records that are lost, for one damaged place
    (tmp_path / "lines.jsonl").write_bytes(content)
    assert records(tmp_path / "lines.jsonl") == expected


def test_a_huge_line_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # catches a file without newlines that fills the memory
    monkeypatch.setattr("stabletrain.runtime.records.json_lines._MAX_LINE", 100)
    (tmp_path / "lines.jsonl").write_text(f'{{"a": 1}}\n{"x" * 1234}\n{{"a": 2}}\n')
    assert [(line.number, line.record) for line in read_lines(tmp_path / "lines.jsonl")] == [
        (1, {"a": 1}),
        (2, None),
        (3, {"a": 2}),
    ]


def test_only_files_are_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # catches a named pipe that hangs the run, and a link that leads out of the run's folder
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match=r"regular file|directory"):
            list(read_lines(path))
    (tmp_path / "lines.jsonl").symlink_to(tmp_path / "outside")
    JsonLines(tmp_path / "lines.jsonl", "events").append("a")
    assert not (tmp_path / "outside").exists()
    assert caplog.text.count("events cannot be written") == 1


def test_a_folder_that_is_removed_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # catches a log that goes on as if nothing were missing
    path = tmp_path / "run" / "lines.jsonl"
    lines = JsonLines(path, "events")
    lines.append("a")
    path.unlink()
    path.parent.rmdir()
    lines.append("b")
    lines.append("c")
    assert path.read_text() == "b\nc\n"
    assert caplog.text.count("was removed during the run") == 1


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    # catches lines that are mixed or overwritten when a resumed run meets one that has not ended
    path = tmp_path / "lines.jsonl"
    code = (
        "import sys; from pathlib import Path; from stabletrain.runtime.records.json_lines import JsonLines\n"
        "lines = JsonLines(Path(sys.argv[1]), 'x')\n"
        'for i in range(300): lines.append(\'{"p": %s, "i": %d, "x": "%s"}\' % (sys.argv[2], i, \'x\' * 2000))'
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), str(number)]) for number in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    found = [line.record for line in read_lines(path)]
    for number in range(2):
        assert [each["i"] for each in found if each is not None and each["p"] == number] == list(range(300))
