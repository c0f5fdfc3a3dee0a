"""Read a YAML file that anybody may have written: bounded in size, depth and aliases, plain values only.

The tree of a document is measured while it is composed, before any value is constructed: a few lines of aliases can
stand for billions of values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from stabletrain.config.problems import ConfigError, Problem
from stabletrain.runtime.records.regular_file import only_regular, unusual_kind

LARGEST_FILE = 2**20
"""Bytes. A recipe has a few hundred; a run.yaml a few thousand."""
DEEPEST = 32
"""Levels of nested mappings and lists."""
MOST_VALUES = 20_000
"""Values in a file, with aliases expanded."""

_STR = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(file: Path, *, exponents: bool = True) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Args:
        file: a regular file in UTF-8, with or without byte order mark.
        exponents: whether ``1e-3`` is a number, as in OmegaConf and YAML 1.2; it is text in YAML 1.1, in which PyYAML
            writes a run.yaml.

    Raises:
        ConfigError: if it cannot be read, is no YAML, is larger than the limits of this module, or contains anything
            but mappings with text as keys, lists, text, numbers, booleans and null. The message names file and line.
    """
    return parse_yaml(read_text(file), file, exponents=exponents)


def parse_yaml(text: str, file: Path, *, exponents: bool = True) -> dict[str, Any]:
    """Return the mapping in the text of a YAML file; see `read_yaml`.

    Args:
        text: from `read_text`.
        file: named in messages.
        exponents: see `read_yaml`.

    Raises:
        ConfigError: see `read_yaml`.
    """
    loader = (_Loader if exponents else _PlainLoader)(text)
    try:
        node = loader.get_single_node()
        found = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        text = reason if isinstance(error, _Refused) else f"expected valid YAML: {reason}"
        raise ConfigError([Problem(_place(file, mark), text)]) from None
    except yaml.YAMLError as error:
        raise ConfigError([Problem(str(file), f"expected valid YAML: {' '.join(str(error).split())}")]) from None
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ConfigError([Problem(str(file), f"expected valid YAML: {' '.join(str(error).split())}")]) from None
    finally:
        loader.dispose()
    if found is None:
        return {}
    if not isinstance(found, dict):
        got = f"{found!r:.40} ({type(found).__name__})" if not isinstance(found, list) else "a list"
        raise ConfigError([Problem(str(file), f"expected keys with values (key: value), got {got}")])
    return found


def read_text(file: Path) -> str:
    """Return the text of a file; only a regular file is read, since a named pipe or a device has no end.

    Args:
        file: at most `LARGEST_FILE` bytes in UTF-8.

    Raises:
        ConfigError: if it cannot be read, or is no text.
    """
    try:
        kind, raw = unusual_kind(file.stat().st_mode), b""
        if kind is None:
            with open(file, "rb", opener=only_regular) as opened:
                raw = opened.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([Problem(str(file), f"cannot be read ({reason}); expected a YAML file")]) from None
    if kind is not None:
        raise ConfigError([Problem(str(file), f"expected a file, got {kind}; name a YAML file")])
    if len(raw) > LARGEST_FILE:
        raise ConfigError([Problem(str(file), f"expected YAML of at most {LARGEST_FILE // 1024} KiB, got more")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            [Problem(f"{file}, line {line}", f"expected UTF-8, got the byte {raw[error.start]:#04x}; convert it")]
        ) from None
    unprintable = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if unprintable is not None:
        line = text.count("\n", 0, unprintable.start()) + 1
        found = unprintable.group()
        raise ConfigError(
            [Problem(f"{file}, line {line}", f"expected text, got the control character {found!r}; remove it")]
        )
    return text


def _place(file: Path, mark: yaml.Mark | None) -> str:
    return str(file) if mark is None else f"{file}, line {mark.line + 1}"


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader with limits, without tags, dates, sets, duplicate keys and keys that are no text."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[int, int] = {}  # of complete nodes, by their id
        self._depth = 0
        self._count = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Measure each node as it is composed, an alias with all that it stands for."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            size = self._sizes.get(id(node))
            if size is None:
                raise _Refused(f"the alias *{event.anchor} is inside the value that it stands for; write it out", mark)
            self._add(size, mark)
            return node
        if event.tag not in (None, "!"):
            raise _Refused(f"expected no tags, got {event.tag!r}; remove it (text is written in quotes)", mark)
        self._depth += 1
        if self._depth > DEEPEST:
            raise _Refused(f"expected at most {DEEPEST} levels of mappings and lists, got more", mark)
        before = self._count
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._add(1, mark)
        self._sizes[id(node)] = self._count - before
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Compose a mapping, and check its keys before a merge (``<<``) adds others."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag not in (_STR, _MERGE):
                got = (key.value or "nothing") if isinstance(key, ScalarNode) else "a list or mapping"
                raise _Refused(f"expected text as a key, got {got}; write it in quotes if it is text", key.start_mark)
            if key.value in lines:
                raise _Refused(f"the key {key.value!r} is in line {lines[key.value]}, too; remove one", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node

    def _add(self, values: int, mark: yaml.Mark) -> None:
        self._count += values
        if self._count > MOST_VALUES:
            raise _Refused(f"expected at most {MOST_VALUES} values, with aliases written out, got more", mark)


class _Loader(_PlainLoader):
    """Like OmegaConf's loader, which reads ``1e-3`` as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


class _Refused(yaml.MarkedYAMLError):
    """A document that is valid YAML, but exceeds a limit of this module."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(None, None, problem, mark)
