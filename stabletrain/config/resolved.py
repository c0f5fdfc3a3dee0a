"""Turn a composed config into plain values, once: what is checked afterwards is what is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stabletrain.config.problems import ConfigError, Problem

LARGEST = 1_000_000
"""Values and characters of a config, with every reference replaced by what it stands for."""

_REFERENCE = re.compile(r"\$\{\s*(\.*)([\w\[\].-]+?)\s*\}")
_LARGEST_INTEGER = 2**63


def resolve_once(config: DictConfig) -> dict[str, Any]:
    """Return a config as plain mappings, lists and values, with every interpolation resolved.

    Args:
        config: composed; missing values (``???``) stay.

    Raises:
        ConfigError: if an interpolation cannot be resolved, refers to itself or stands for too much, or what remains
            contains ``${``, which would be resolved later, or anything but plain values.
    """
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    _Sizes(raw).check()
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError([Problem(str(error.full_key or "config"), f"cannot be resolved: {reason[0]}")]) from None
    except RecursionError:
        raise ConfigError([Problem("config", "its interpolations refer to each other in a circle")]) from None
    plain = _number_keys_as_text(plain)
    assert isinstance(plain, dict)
    found = [Problem(key or repr(plain), text) for key, text in _not_plain(plain, "")]
    if found:
        raise ConfigError(found)
    return {str(key): value for key, value in plain.items()}


def missing_keys(node: object, key: str = "") -> Iterator[str]:
    """Yield the keys whose value is ``???``.

    Args:
        node: plain values.
        key: the node's key.
    """
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from missing_keys(value, f"{key}.{name}" if key else name)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from missing_keys(value, f"{key}[{index}]")
    elif node == "???":
        yield key


def _number_keys_as_text(node: Any) -> Any:
    """Write keys that are whole numbers as text, as a run.yaml has them: on a command line they cannot be quoted."""
    if isinstance(node, dict):
        whole = [key for key in node if type(key) is int and str(key) not in node]
        return {str(key) if key in whole else key: _number_keys_as_text(value) for key, value in node.items()}
    return [_number_keys_as_text(each) for each in node] if isinstance(node, list) else node


def _not_plain(node: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            if not isinstance(name, str):
                yield key, f"expected text as a key, got {name!r}; write it in quotes if it is text"
                continue
            where = f"{key}.{name}" if key else name
            if problem := _bad_text(name):
                yield where, problem
            yield from _not_plain(value, where)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _not_plain(value, f"{key}[{index}]")
    elif isinstance(node, str):
        if problem := _bad_text(node):
            yield key, problem
    elif isinstance(node, int) and not isinstance(node, bool):
        if not -_LARGEST_INTEGER <= node < _LARGEST_INTEGER:
            yield key, "expected an integer of at most 64 bits, got a larger one"
    elif not isinstance(node, float | bool | None):
        yield key, f"expected a plain value, got {node!r:.100} ({type(node).__name__})"


def _bad_text(text: str) -> str | None:
    if "${" in text:
        return f"expected a plain value, got {text!r:.200}, with '${{' after everything was resolved; remove it"
    if "\0" in text:
        return f"expected text, got {text!r:.200} with a null character; remove it"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return f"expected text in UTF-8, got {text!r:.200}; write it in UTF-8"
    return None


class _Sizes:
    """How large a config becomes when its references are replaced, computed before that is done."""

    def __init__(self, raw: dict[Any, Any]) -> None:
        self._raw = raw
        self._known: dict[tuple[str, ...], int] = {}
        self._open: list[tuple[str, ...]] = []

    def check(self) -> None:
        """Raise a `ConfigError` if it is too large, or refers to itself."""
        for key in self._raw:
            if self._at((str(key),)) > LARGEST:
                text = f"expected at most {LARGEST} values and characters with references written out, got more"
                raise ConfigError([Problem(str(key), text)])

    def _at(self, path: tuple[str, ...]) -> int:
        if path in self._open:
            names = " -> ".join(".".join(each) for each in (*self._open[self._open.index(path) :], path))
            raise ConfigError([Problem(".".join(self._open[-1]), f"the references form a circle: {names}")])
        if path not in self._known:
            self._open.append(path)
            node, found = self._find(path)
            self._known[path] = 1 if not found else self._of(node, path)
            self._open.pop()
        return self._known[path]

    def _of(self, node: object, path: tuple[str, ...]) -> int:
        if isinstance(node, dict):
            return 1 + sum(self._at((*path, str(name))) for name in node)
        if isinstance(node, list):
            return 1 + sum(self._at((*path, str(index))) for index in range(len(node)))
        if not isinstance(node, str):
            return 1
        size = 1 + len(node)
        for dots, rest in _REFERENCE.findall(node):
            base = path[: -len(dots)] if dots else ()
            target = (*base, *re.sub(r"[\[\]]+", ".", rest).strip(".").split("."))
            known = self._known_part(target)
            if not self._find(known)[1]:
                text = f"refers to the key {'.'.join(target)!r}, which does not exist; correct the name"
                raise ConfigError([Problem(".".join(path), text)])
            size = min(size + self._at(known), LARGEST + 1)
        return size

    def _known_part(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """The path itself, or its beginning up to a value that is a reference to a mapping."""
        for end in range(1, len(path)):
            node, found = self._find(path[:end])
            if found and isinstance(node, str):
                return path[:end]
        return path

    def _find(self, path: tuple[str, ...]) -> tuple[object, bool]:
        node: Any = self._raw
        for part in path:
            if isinstance(node, dict) and part in node:
                node = node[part]
            elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                node = node[int(part)]
            else:
                return None, False
        return node, True
