"""YAML files that anybody may have written."""

import os
from pathlib import Path

import pytest

from stabletrain.config.problems import ConfigError
from stabletrain.config.yaml_file import DEEPEST, LARGEST_FILE, MOST_VALUES, read_yaml

_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1", ["expected keys with values", "got 1"]),
        ("[]", ["got a list"]),
        ('"text"', ["got 'text'"]),
        ("a: 1\n{1: 2}", ["line 2"]),
        ("a: {1: 2}", ["line 1", "expected text as a key, got 1"]),
        ("on: 3", ["expected text as a key, got on"]),
        ("~: 3", ["expected text as a key, got ~"]),
        ("? [a]\n: 1", ["expected text as a key"]),
        ("a: 1\nb: 2\na: 3", ["line 3", "the key 'a' is in line 1"]),
        ("a: &a [*a]", ["*a is inside the value"]),
        ("a: &a {b: {c: *a}}", ["*a is inside the value"]),
        ("[" * 2000, [f"at most {DEEPEST} levels"]),
        ("a: " + "[" * 2000, [f"at most {DEEPEST} levels"]),
        ("- " * 2000, [f"at most {DEEPEST} levels"]),
        (_BOMB, ["line 5", f"at most {MOST_VALUES} values"]),
        ("a: [" + "1," * MOST_VALUES + "]", [f"at most {MOST_VALUES} values"]),
        ("a: !!python/object/apply:os.system [x]", ["expected no tags"]),
        ("a: !!set {x}", ["expected no tags"]),
        ("a: !!binary x", ["expected no tags"]),
        ("a: 1\n---\nb: 2", ["line 2", "single document"]),
        ("a:\n\tb: 1", ["line 2", "'\\t'"]),
        ("a: 1\nb: \0", ["line 2", "control character"]),
        (b"a: 1\nb: \xff", ["line 2", "UTF-8", "0xff"]),
        ("a: *b", ["undefined alias 'b'"]),
        ("<<: 3", ["expected a mapping"]),
        ("a: " + "9" * 5000, ["expected valid YAML"]),
        ("a: 'x", ["line 1"]),
        ("x" * (LARGEST_FILE + 1), ["at most 1024 KiB"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_refused(tmp_path: Path, content: str | bytes, words: list[str]) -> None:
    """Bugs: a traceback, minutes of work, or a value of a type that no config has; a message without file and line."""
    file = tmp_path / "a.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    for word in (str(file), *words):
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", {}),
        ("# nothing\n", {}),
        (b"\xef\xbb\xbfa: 1", {"a": 1}),
        ("a: 1e-3\nb: 1_000\nc: 0o7\nd: 2020-01-01", {"a": 1e-3, "b": 1000, "c": "0o7", "d": "2020-01-01"}),
        ("a: &a {b: 1}\nc: {<<: *a, d: [*a]}", {"a": {"b": 1}, "c": {"b": 1, "d": [{"b": 1}]}}),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_file_that_is_read(tmp_path: Path, content: str | bytes, expected: object) -> None:
    """Bug: a byte order mark, a date or a merge is refused, or changes the values."""
    file = tmp_path / "a.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_yaml(file) == expected


def test_a_number_with_an_exponent_is_text_in_what_pyyaml_wrote(tmp_path: Path) -> None:
    """Bug: the experiment "1e5" in a run.yaml, which PyYAML writes without quotes, becomes a number in the worker."""
    (tmp_path / "a.yaml").write_text("a: 1e5\n")
    assert read_yaml(tmp_path / "a.yaml", exponents=False) == {"a": "1e5"}


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """Bug: a named pipe or a device, of which reading does not end."""
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, word in (
        (tmp_path / "pipe.yaml", "a named pipe"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a device"),
        (tmp_path / "none.yaml", "No such file"),
        (Path("a\0b"), "null byte"),
    ):
        with pytest.raises(ConfigError, match=word):
            read_yaml(path)
