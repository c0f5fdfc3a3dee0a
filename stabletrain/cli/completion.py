"""Shell completion of recipes, groups and options, which it reads from files, and of keys of a composed recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stabletrain.config import discovery
from stabletrain.errors import UserError


def complete(words: Sequence[str], incomplete: str) -> list[str]:
    """Return the completions of the last word of a command line.

    Args:
        words: the words before it.
        incomplete: the beginning of the word.

    >>> complete([], "char")
    ['char_gpt']
    >>> complete(["char_gpt"], "plugins/clip=no")[0]
    'plugins/clip=none'
    """
    recipes = discovery.recipes()
    named = [word for word in words if "=" not in word]
    if not named and "=" not in incomplete and "/" not in incomplete and "." not in incomplete:
        found = [name for name in recipes if name.startswith(incomplete)]
        if found:
            return found
    prefix = "".join(character for character in incomplete[:2] if character in "+~")
    typed = incomplete[len(prefix) :]
    groups = discovery.groups()
    group, equals, option = typed.partition("=")
    if equals:
        *earlier, last = option.split(",")
        options = groups.get(group, {})
        return [f"{prefix}{group}={','.join([*earlier, name])}" for name in options if name.startswith(last)]
    found = [f"{prefix}{name}=" for name in groups if name.startswith(typed)]
    if "/" not in typed and named and named[0] in recipes:
        found += [f"{prefix}{key}=" for key in _keys(named[0], words) if key.startswith(typed)]
    return found


def _keys(recipe: str, words: Sequence[str]) -> list[str]:
    from stabletrain.config.compose import compose

    try:
        composed = compose(recipe, [word for word in words if "=" in word and "," not in word])
    except UserError:
        return []
    return sorted(_leaves(composed.config))


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            yield f"{prefix}{key}"
