"""How the user changes the parameter groups: a dataclass of options, checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from stabletrain.errors import UserError

KEY = "param_groups"
"""Config key of the options for the optimizer that the command line selects."""
PATTERN = "pattern"
_EXPECTED = "expected a mapping with pattern, and decay, weight_decay or lr_scale"


@dataclass(frozen=True, kw_only=True)
class Override:
    """Options of the parameters whose name matches an expression.

    Args:
        pattern: a regular expression, searched for in the parameter's name, such as ``"head"`` or ``"^net.norm"``.
        decay: whether the optimizer's weight decay applies to them; None: as decided for each.
        weight_decay: their weight decay, >= 0, in place of the optimizer's; None: the optimizer's.
        lr_scale: factor on their learning rate, > 0.
        index: its place in the list of overrides, from 0, for messages.
    """

    pattern: str
    decay: bool | None = None
    weight_decay: float | None = None
    lr_scale: float = 1.0
    index: int = 0

    def matches(self, names: Sequence[str]) -> bool:
        """Whether one of a parameter's names matches."""
        return any(re.search(self.pattern, name) for name in names)


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """How parameters are divided into groups; `group_options` checks the values.

    Args:
        decay_embeddings: whether weight decay applies to embeddings, as in Hugging Face's Trainer and timm; not by
            default, as in OLMo-core and nanochat.
        layer_decay: factor on the learning rate per layer from the output towards the input, 0 < layer_decay <= 1; 1:
            off. For fine-tuning, 0.65 to 0.9 are usual (arXiv 2106.08254).
        layers: name of the list of blocks for ``layer_decay``, such as ``"net.blocks"``; None: the largest one.
        overrides: mappings with ``pattern``, a regular expression that is searched for in the parameters' names, and
            ``decay`` (true or false), ``weight_decay`` (>= 0) or ``lr_scale`` (> 0). The first that matches wins.
    """

    decay_embeddings: bool = False
    layer_decay: float = 1.0
    layers: str | None = None
    overrides: Sequence[Mapping[str, Any]] = ()

    def parsed(self, key: str) -> list[Override]:
        """Return the overrides as objects.

        Args:
            key: config key of the options, for messages.

        Raises:
            UserError: if one is no such mapping.
        """
        given = () if self.overrides is None else self.overrides
        if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
            raise UserError(f"{key}.overrides: expected a list of mappings with pattern, got {given!r:.200}")
        return [_override(each, f"{key}.overrides[{index}]", index) for index, each in enumerate(given)]


def group_options(key: str, **options: Any) -> GroupOptions:
    """Return checked options.

    Args:
        key: their config key, for messages.
        options: see `GroupOptions`.

    Raises:
        UserError: if a value is out of range.

    >>> group_options("param_groups", layer_decay=2.0)
    Traceback (most recent call last):
    ...
    stabletrain.errors.UserError: param_groups.layer_decay: expected a number above 0 and at most 1, got 2.0
    """
    made = GroupOptions(**options)
    if not isinstance(made.decay_embeddings, bool):
        raise UserError(f"{key}.decay_embeddings: expected true or false, got {made.decay_embeddings!r}")
    if not _is_number(made.layer_decay, 0.0, inclusive=False) or made.layer_decay > 1:
        raise UserError(f"{key}.layer_decay: expected a number above 0 and at most 1, got {made.layer_decay!r}")
    if made.layers is not None and (not isinstance(made.layers, str) or not made.layers):
        raise UserError(f"{key}.layers: expected the name of a list of blocks, or null, got {made.layers!r}")
    made.parsed(key)
    return replace(made, overrides=tuple(made.overrides or ()))


def _override(given: object, where: str, index: int) -> Override:
    known = [field.name for field in fields(Override) if field.name != "index"]
    if not isinstance(given, Mapping) or not set(given) <= set(known) or PATTERN not in given:
        raise UserError(f"{where}: {_EXPECTED}, got {given!r:.200}")
    pattern = given[PATTERN]
    try:
        if not isinstance(pattern, str) or not pattern:
            raise UserError(f"{where}.pattern: expected a regular expression, got {pattern!r}")
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}.pattern: expected a regular expression, got {pattern!r}: {error}") from None
    made = Override(**given, index=index)
    if made.decay is not None and not isinstance(made.decay, bool):
        raise UserError(f"{where}.decay: expected true or false, got {made.decay!r}")
    if made.weight_decay is not None and not _is_number(made.weight_decay, 0.0, inclusive=True):
        raise UserError(f"{where}.weight_decay: expected a number >= 0, got {made.weight_decay!r}")
    if not _is_number(made.lr_scale, 0.0, inclusive=False):
        raise UserError(f"{where}.lr_scale: expected a number > 0, got {made.lr_scale!r}")
    if made.decay is False and made.weight_decay:
        raise UserError(f"{where}: decay is false, and weight_decay is {made.weight_decay}; remove one of them")
    if made.decay is None and made.weight_decay is None and made.lr_scale == 1.0:
        raise UserError(f"{where}: it changes nothing; set decay, weight_decay or lr_scale")
    return made


def _is_number(value: object, least: float, *, inclusive: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value):
        return False
    return value >= least if inclusive else value > least
