"""Hyper-parameters as data that ``load_from_checkpoint`` reads with ``weights_only=True``.

torch reads few classes from a file of data, so configs of OmegaConf, namespaces and dictionaries with attributes become
an ordered dict that has its items as attributes too (`with_attributes`), paths become text, and small arrays lists. Any
other object is kept as the text of its ``repr``; a run that resumes takes the object itself from its own module.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

ENTRIES = ("hyper_parameters", "datamodule_hyper_parameters")
"""The entries of a checkpoint that hold them."""
TYPES = ("hparams_type", "datamodule_hparams_type")
"""The entries with the class that Lightning calls on all hyper-parameters: a config's."""
TYPE_NAME = "AttributeDict"
"""For a text in that entry Lightning uses its own dictionary with attributes."""

_TEXT_LIMIT = 500
_ARRAY_LIMIT = 10_000


class WithAttributes(dict[Any, Any]):
    """A dictionary whose items are to be attributes too when it is read."""


def as_plain(value: Any) -> Any:
    """One hyper-parameter with its container as plain Python; what is inside it may still be anything."""
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
        return _from_config(value, omegaconf.OmegaConf)
    if isinstance(value, argparse.Namespace):
        return WithAttributes(vars(value))
    if isinstance(value, dict) and hasattr(type(value), "__getattr__"):
        return WithAttributes(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, deque):
        return list(value)
    if isinstance(value, frozenset):
        return set(value)
    if isinstance(value, np.ndarray) and value.size <= _ARRAY_LIMIT:
        return value.tolist()
    return value


def _from_config(config: Any, omegaconf: Any) -> Any:
    try:
        plain = omegaconf.to_container(config, resolve=True, throw_on_missing=False)
    except Exception:  # an interpolation can run any resolver, which may need the app that the config is from
        plain = omegaconf.to_container(config, resolve=False, throw_on_missing=False)
    return _marked(plain)


def _marked(plain: Any) -> Any:
    if isinstance(plain, dict):
        return WithAttributes({key: _marked(value) for key, value in plain.items()})
    return [_marked(value) for value in plain] if isinstance(plain, list) else plain


def with_attributes(items: Mapping[Any, Any]) -> OrderedDict[Any, Any]:
    """An ordered dict with its items as attributes, except those named as its methods; torch reads it as data.

    >>> config = with_attributes({"width": 3, "items": 4})
    >>> config.width, config["width"], config["items"], callable(config.items)
    (3, 3, 4, True)
    """
    found = OrderedDict(items)
    for key, value in items.items():
        if isinstance(key, str) and not key.startswith("__") and not hasattr(OrderedDict, key):
            found.__dict__[key] = value
    return found


def text_of(value: Any) -> str:
    """The ``repr`` of an object, shortened."""
    try:
        text = repr(value)
    except Exception:  # code of any class
        text = f"<{type(value).__qualname__}>"
    return text if len(text) <= _TEXT_LIMIT else text[:_TEXT_LIMIT] + "..."


def live_object(trainer: Trainer, path: Sequence[Any]) -> Any:
    """The object of a running module or data module that was kept as text.

    Args:
        trainer: that is about to restore the checkpoint.
        path: where it was, from the entry of the checkpoint on.

    Raises:
        LookupError: if it has no such hyper-parameter or attribute.
    """
    owner: Any = trainer.lightning_module if path[0] == ENTRIES[0] else trainer.datamodule  # type: ignore[attr-defined]
    hparams = getattr(owner, "hparams", None) or {}
    if len(path) < 2 or not (path[1] in hparams or hasattr(owner, str(path[1]))):
        raise LookupError(path)
    found = hparams[path[1]] if path[1] in hparams else getattr(owner, str(path[1]))
    for key in path[2:]:
        if not isinstance(found, Mapping | Sequence) or isinstance(found, str):
            raise LookupError(key)
        found = found[key]
    return found
