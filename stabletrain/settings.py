"""How a message names a setting: by its config key, or to the reader of a script as the argument that it is.

Messages are written with config keys, since every setting has exactly one: ``plugins.clip.max_norm=1``. To somebody who
has never seen a config, `worded` says the same as ``ClipNorm(max_norm=1)``. Which of both it is follows from how the
callbacks were built: `by_config` and `mark` note what is built from a config, `register` what a Trainer has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_VALUE = r"[\w-]+(?:\.[\w-]+)*%?"
_PLUGIN = re.compile(
    r"(?:config keys? )?\bplugins(?:\.(?P<slot>\w+)(?:\.(?P<argument>\w+)(?:\.(?P<option>\w+))?)?|/(?P<group>\w+))"
    rf"(?:=(?P<value>{_VALUE}|<\w+>))?"
)
_LISTED = re.compile(r"config keys? (?P<keys>(?:\w+(?:\.\w+)?(?:=[\w.-]+)?(?:, | and )?)+)")
_OTHER = re.compile(
    r"\b(?P<node>guard|schedule|precision|trainer|resume|strategy(?=\.))(?:\.(?P<argument>\w+))?"
    rf"(?:=(?P<value>{_VALUE}))?"
)
_CLASSES = {"guard": "Guard", "schedule": "ScheduleLR", "precision": "SetPrecision", "trainer": "Trainer"}
_VALUES = {"null": "None", "true": "True", "false": "False"}

_process_has_config = False
_from_config: ContextVar[bool] = ContextVar("what is built comes from a config", default=False)
_registered: dict[str, str | None] = {}
"""By slot, the class that a script has built; None: it was built from a config."""
_MARK = "built_from_config"


@contextmanager
def by_config() -> Iterator[None]:
    """Within it, messages name config keys."""
    token = _from_config.set(True)
    try:
        yield
    finally:
        _from_config.reset(token)


@contextmanager
def speak_of_keys() -> Iterator[None]:
    """Within it, all messages of this process, in all threads, name config keys: the command line, and a worker."""
    global _process_has_config
    before, _process_has_config = _process_has_config, True
    try:
        yield
    finally:
        _process_has_config = before


def mark(callback: object) -> None:
    """Note that a callback was built from a config."""
    callback.__dict__[_MARK] = True


def register(callbacks: Iterable[object]) -> None:
    """Note which plugins a Trainer has, and how each was built; those of an earlier Trainer are forgotten."""
    _registered.clear()
    for each in callbacks:
        slot = getattr(each, "slot", None)
        if isinstance(slot, str):
            _registered[slot] = None if _MARK in each.__dict__ else type(each).__name__


def worded(text: str, slot: str | None = None, owner: str | None = None) -> str:
    """A message with each config key as an argument, unless its reader has a config.

    Args:
        text: with config keys.
        slot: of a plugin whose class is known although no Trainer has it yet.
        owner: name of that class.

    >>> register([])  # no Trainer has been made yet
    >>> worded("loss nan (plugins.nonfinite.max_in_a_row=10)", "nonfinite", "SkipNonFinite")
    'loss nan (SkipNonFinite(max_in_a_row=10))'
    >>> worded("use another (config key guard.mode), or plugins/spike=detect")
    'use another (Guard(mode=...)), or default_callbacks(spike="detect")'
    >>> worded("Rollback: plugins.spike.accept=null, plugins.spike.expect=50%, plugins.spike.every=5.")
    'Rollback: accept=None, expect="50%", every=5.'
    >>> worded("use another folder (config key plugins.checkpoints.memory.folder)", "checkpoints", "SaveCheckpoints")
    'use another folder (SaveCheckpoints(memory={"folder": ...}))'
    >>> with by_config():
    ...     worded("use another (config key guard.mode)")
    'use another (config key guard.mode)'
    """
    if _process_has_config or _from_config.get() or (_registered and not any(_registered.values())):
        return text
    classes = {**_registered, **({slot: owner} if slot is not None else {})}

    def plugin(match: re.Match[str]) -> str:
        name, argument, value = match["slot"] or match["group"], match["argument"], match["value"]
        if classes.get(name, "") is None:
            return match[0]
        if argument is None and value is not None:
            return f'default_callbacks({name}="{value}")'
        if argument is None:
            return classes.get(name) or name
        if match["option"] is not None:
            return _call(classes.get(name), argument, f'{{"{match["option"]}": {_python(value)}}}')
        return _call(classes.get(name), argument, _python(value))

    def listed(match: re.Match[str]) -> str:
        named, count = _OTHER.subn(other, match["keys"])
        return named if count else match[0]

    def other(match: re.Match[str]) -> str:
        node, argument, value = match["node"], match["argument"], match["value"]
        if node == "resume":
            return "ckpt_path"
        if argument is not None:
            return _call(_CLASSES.get(node) or classes.get(node), argument, _python(value))
        return _CLASSES[node] if value is None else f'default_callbacks({node}="{value}")'

    return _LISTED.sub(listed, _PLUGIN.sub(plugin, text))


def worded_of(text: str, plugin: object) -> str:
    """A message of a plugin that may be the only one of a script, as `worded`.

    Args:
        text: with config keys.
        plugin: a callback with an attribute ``slot``.
    """
    if _MARK in plugin.__dict__:
        return text
    return worded(text, getattr(plugin, "slot", None), type(plugin).__name__)


def _call(owner: str | None, argument: str, value: str) -> str:
    given = f"{argument}={value}"
    return given if owner is None else f"{owner}({given})"


def _python(value: str | None) -> str:
    """A value as it is written in a script."""
    if value is None:
        return "..."
    try:
        float(value)
    except ValueError:
        return _VALUES.get(value) or (value if value.startswith("<") else f'"{value}"')
    return value
