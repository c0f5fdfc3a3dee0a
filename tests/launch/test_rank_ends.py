"""Files in which a process says how it ended: whole, checked, and readable although a disk is full or gone."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from stabletrain.launch import rank_ends
from stabletrain.launch.bounded import MAX_MESSAGE
from stabletrain.launch.final_status import final_result
from stabletrain.launch.process import ProcessEnd
from stabletrain.launch.rank_ends import (
    SPARE_ENV,
    RankEnd,
    read_ends,
    read_exit_codes,
    remove_ends,
    remove_own_end,
    spare_folder,
    this_rank,
    write_end,
    write_exit_codes,
)
from stabletrain.launch.result import Result, read_result

END = RankEnd(
    rank=1, result=Result(end="failed", message="a bug", steps=3, metrics={"loss": 2.0}), agreed=True, at="step 3"
)


def test_an_end_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Bug: a field that is written is not read."""
    write_end(END, tmp_path)
    write_end(dataclasses.replace(END, rank=0, consequence=True), tmp_path)
    assert read_ends(tmp_path) == [dataclasses.replace(END, rank=0, consequence=True), END]


@pytest.mark.parametrize("problem", ["removed", "a file", "full"])
def test_the_second_folder_is_used_if_the_first_cannot_be_written(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs: a full or removed run folder loses the result; the removed folder is made again, with one file in it."""
    run = tmp_path / "run"
    if problem != "removed":
        run.mkdir()
    if problem == "a file":
        (run / "ends").touch()
    if problem == "full":
        inner = rank_ends.write_json

        def full(path: Path, content: object) -> None:
            if path.is_relative_to(run):
                raise OSError(errno.ENOSPC, "No space left on device")
            inner(path, content)

        monkeypatch.setattr(rank_ends, "write_json", full)
    with pytest.raises(OSError, match=r"No such file|Not a directory|File exists|No space"):
        write_end(END, run)
    with spare_folder() as spare:
        assert spare is not None
        monkeypatch.setenv(SPARE_ENV, str(spare))
        write_end(END, run)
        assert read_ends(run, spare) == [END]
        write_exit_codes({1: -9})
        assert read_exit_codes(spare) == {1: -9}
        config = {"run_dir": str(run), "launch": {"kind": "local", "processes": 2, "nodes": 1}}
        result = final_result(config, ProcessEnd(code=1), spare)
        assert (result.end, result.message, result.steps) == ("failed", "a bug (at step 3)", 3)
    assert not spare.exists()
    assert (problem == "removed") != run.exists()


def test_nothing_of_an_earlier_attempt_is_believed(tmp_path: Path) -> None:
    """Bug: a requeued job that is killed has the end of the attempt before it."""
    for rank in (0, 1):
        write_end(dataclasses.replace(END, rank=rank), tmp_path)
    Result(end="terminated").write(tmp_path)
    remove_own_end(tmp_path, 1)
    assert [end.rank for end in read_ends(tmp_path)] == [0]
    assert read_result(tmp_path) is not None
    remove_own_end(tmp_path, 0)
    assert read_result(tmp_path) is None
    write_end(END, tmp_path)
    remove_ends(tmp_path)
    assert read_ends(tmp_path) == []
    remove_ends(tmp_path / "missing")


def damaged(content: dict[str, Any]) -> "list[object]":
    """Every field missing, and with values of other types or sizes."""
    found: list[object] = [None, 3, "text", [], [content], {}]
    odd: tuple[object, ...] = (None, -1, 2.5, True, "x", [1], {"a": 1}, 10**30)
    for name in content:
        found.append({key: value for key, value in content.items() if key != name})
        found += [{**content, name: value} for value in odd]
    return found


def test_damaged_files_are_ignored(tmp_path: Path) -> None:
    """Bug: a traceback, or an end that does not exist, from a file that somebody else or a crash left."""
    whole = json.loads(json.dumps(dataclasses.asdict(END)))
    (tmp_path / "ends").mkdir()
    file, result = tmp_path / "ends" / "rank-1.json", tmp_path / "result.json"
    contents = [json.dumps(each) for each in damaged(whole)]
    contents += [json.dumps({**whole, "result": each}) for each in damaged(whole["result"])]
    contents += ["", "{", "\x00", "[" * 100_000, "NaN", "1e999", json.dumps(whole)[:-20]]
    for content in contents:
        file.write_text(content)
        for end in read_ends(tmp_path):
            assert isinstance(end.rank + end.result.exit_code, int), content
    for content in [*map(json.dumps, damaged(whole["result"])), *contents]:
        result.write_text(content)
        found = read_result(tmp_path)
        assert found is None or (found.end in ("failed",) and found.seconds >= 0 and isinstance(found.message, str))


def test_other_kinds_of_files_are_not_opened(tmp_path: Path) -> None:
    """Bugs: a FIFO called result.json is waited for, for ever; a file of gigabytes is read."""
    os.mkfifo(tmp_path / "result.json")
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").unlink()
    (tmp_path / "result.json").mkdir()
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").rmdir()
    with (tmp_path / "result.json").open("wb") as file:
        file.truncate(5_000_000)
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_bytes(b"\xff\xfe{}")
    assert read_result(tmp_path) is None
    text = "\x1b]0;title\x07" + "x" * 1_000_000
    (tmp_path / "result.json").write_text(json.dumps({"end": "failed", "message": text, "of_a_newer_version": 1}))
    found = read_result(tmp_path)
    assert found is not None
    assert len(found.message) <= MAX_MESSAGE
    assert found.message.startswith("\\x1b]0;title\\x07")


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"SLURM_PROCID": "5"}, 5),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": "x"}, 0),
    ],
)
def test_the_rank_of_a_process(environment: dict[str, str], rank: int) -> None:
    """Bug: two ranks write the same file."""
    assert this_rank(environment) == rank


def test_a_result_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a full disk leaves half a file, or the scratch file."""
    Result(end="failed").write(tmp_path)

    def full(self: Path, *args: Any, **kwargs: Any) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        Result(end="finished").write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    found = read_result(tmp_path)
    assert found is not None
    assert found.end == "failed"
