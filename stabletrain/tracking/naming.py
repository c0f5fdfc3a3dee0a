"""Convert names, values and nested parameters to forms that MLflow accepts, so that different ones stay different."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import TypeVar

_T = TypeVar("_T")

MAX_KEY = 250
MAX_NAME = 250
MAX_PARAM = 6000
MAX_TAG = 8000

_FORBIDDEN = re.compile(r"[^A-Za-z0-9_./ -]")


@lru_cache(maxsize=65536)
def safe_key(name: str) -> str:
    """Return a name that MLflow accepts; different names give different results, in every process.

    A name that must be changed gets six hexadecimal digits of its hash, so ``loss@val`` and ``loss_val`` are two
    metrics, also after a resume.

    Args:
        name: of a metric, parameter or tag.

    >>> safe_key("val/loss")
    'val/loss'
    >>> safe_key("loss@val") == safe_key("loss#val")
    False
    >>> len(safe_key("x" * 1000))
    250
    """
    key = _FORBIDDEN.sub("_", name)
    if key and (posixpath.normpath(key) != key or key.startswith(("/", "..")) or key == "."):
        key = "/".join(part.replace("..", "__") for part in key.split("/") if part not in ("", "."))
    if key == name and 0 < len(key) <= MAX_KEY:
        return key
    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{key[: MAX_KEY - 7]}-{digits}"


def shorten(value: object, limit: int) -> str:
    """Return ``value`` as text of at most ``limit`` characters; a longer text ends with its length and hash.

    Args:
        value: converted with ``str``.
        limit: characters, >= 100.

    >>> shorten(0.1, 6000)
    '0.1'
    >>> shorten("a" * 7000, 6000) == shorten("a" * 6999 + "b", 6000)
    False
    """
    text = str(value)
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    note = f"... ({len(text)} characters, sha256 {digest})"
    return text[: limit - len(note)] + note


def flatten(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every leaf of nested mappings, and of lists that contain mappings, with its dotted name.

    Args:
        node: mappings, lists and plain values.
        prefix: name of ``node`` itself.

    >>> dict(flatten({"optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "callbacks": {}, "x": [{"a": 1}]}))
    {'optimizer.lr': 0.1, 'optimizer.betas': [0.9, 0.95], 'callbacks': '{}', 'x.0.a': 1}
    """
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, Mapping):
        if prefix:
            yield prefix, "{}"
    elif isinstance(node, list | tuple) and any(isinstance(item, Mapping) for item in node):
        for index, item in enumerate(node):
            yield from flatten(item, f"{prefix}.{index}" if prefix else str(index))
    else:
        yield prefix, node


def chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yield lists of at most ``size`` items, in order.

    >>> list(chunks([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
