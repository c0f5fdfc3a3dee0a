"""The hash of a run.yaml that anybody may have written."""

import os
from pathlib import Path

import pytest

from stabletrain.runtime.records.recipe import recipe_hash

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


DEEP = "a: " + "[" * 2000 + "]" * 2000


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", DEEP, DEEP[:2000], "[1]", "x" * 2**21])
def test_a_hostile_file_has_no_hash(text: str, tmp_path: Path) -> None:
    """Bug: a checkpoint is loaded from a folder whose run.yaml needs minutes and all memory, or ends in a traceback."""
    (tmp_path / "run.yaml").write_text(text)
    assert recipe_hash(tmp_path) is None


def test_a_named_pipe_has_no_hash(tmp_path: Path) -> None:
    """Bug: reading it waits for ever."""
    os.mkfifo(tmp_path / "run.yaml")
    assert recipe_hash(tmp_path) is None


def test_an_ordinary_file_has_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {width: 3}\nrun_dir: a\n")
    found = recipe_hash(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {width: 3}\nrun_dir: b\n")
    assert found is not None
    assert recipe_hash(tmp_path) == found


def test_what_only_the_command_line_says_is_no_part_of_it(tmp_path: Path) -> None:
    """Bug: a run that is resumed with another word on the command line seems to have another recipe."""
    found = set()
    for words in ("", "trust: [mine]\n", "typed: [resume, seed]\n", "choices: {model: a}\n"):
        (tmp_path / "run.yaml").write_text(f"model: {{width: 3}}\n{words}")
        found.add(recipe_hash(tmp_path))
    assert len(found) == 1
