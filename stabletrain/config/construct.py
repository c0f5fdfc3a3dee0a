"""Check a config node, then build exactly what was checked, from plain data and without any resolver.

`parse` resolves every ``_target_`` of a node once and returns the calls to make; building makes these calls. Nothing is
looked up or interpolated a second time, so text in a config stays text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stabletrain.config import kinds
from stabletrain.config.annotations import argument_hints
from stabletrain.config.hints import readable
from stabletrain.config.outputs import Outputs
from stabletrain.config.trust import TrustError, resolve
from stabletrain.errors import UserError

DEPTH = 32
"""Largest nesting of mappings and lists in a node."""
SIZE = 20_000
"""Largest number of values in a node; a short YAML file with aliases can stand for billions."""
NODE_KEYS = frozenset({"_target_", "_partial_", "_args_", "_convert_", "_recursive_"})
"""The keys of a node that are no arguments. ``_convert_`` has no effect: containers arrive as plain Python."""

Fault = tuple[str, UserError]


@dataclass(frozen=True)
class Call:
    """A checked node: what will be called with which arguments.

    Args:
        key: its config key.
        target: the class, or the preset of a rule.
        given: the node.
        args: arguments by position; values, or calls in mappings and lists.
        kwargs: arguments by name.
        hints: of the arguments.
        partial: whether the caller gets a callable that lacks some arguments.
    """

    key: str
    target: Callable[..., Any]
    given: Mapping[str, Any]
    args: list[Any]
    kwargs: dict[str, Any]
    hints: Mapping[str, list[Any]]
    partial: bool


def parse(node: Mapping[str, Any], key: str, trust: Iterable[str] = ()) -> tuple[Call | None, list[Fault]]:
    """Check a node and all nodes inside it; return the call, and what is wrong: pairs of a config key and an error.

    Args:
        node: a plain mapping with ``_target_``.
        key: the node's config key; its first word says what may be built (`stabletrain.config.kinds.PLACES`).
        trust: further trusted packages.
    """
    parser = _Parser(tuple(trust))
    if not isinstance(node, Mapping) or "_target_" not in node:
        return None, [(key, UserError(f"expected _target_ and its arguments, got {node!r}"))]
    call = parser.node(node, key, [kinds.place_hint(key)], depth=0)
    return None if parser.too_large else call, parser.faults


def parse_arguments(
    target: Callable[..., Any], given: Mapping[str, Any], key: str, trust: Iterable[str] = ()
) -> tuple[dict[str, Any], list[Fault]]:
    """Check the nodes in the arguments of a call that is not in the config, such as ``Trainer(...)``.

    Args:
        target: the class whose annotations say what may be built.
        given: arguments by name.
        key: config key of the arguments.
        trust: further trusted packages.
    """
    parser = _Parser(tuple(trust))
    hints = argument_hints(target)
    found = {name: parser.value(value, f"{key}.{name}", hints.get(name, []), depth=1) for name, value in given.items()}
    return {} if parser.too_large else found, parser.faults


def instantiate(node: Mapping[str, Any], *, trust: Iterable[str] = (), key: str, outputs: Outputs | None = None) -> Any:
    """Check a node and all nodes inside it, then build it.

    Args:
        node: a plain mapping with ``_target_``.
        trust: further trusted packages.
        key: the node's config key, which says what may be built.
        outputs: where relative paths of files to write are; None: in the current folder.

    Raises:
        UserError: if something in it may not be built; nothing has been built then.
        Exception: that a constructor raises.
    """
    call, faults = parse(node, key, trust)
    raise_first(faults)
    assert call is not None
    return built(call, outputs)


def instantiate_arguments(
    target: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    trust: Iterable[str] = (),
    key: str,
    outputs: Outputs | None = None,
) -> dict[str, Any]:
    """Return the arguments of a call that is not in the config, with the nodes in them built.

    Args:
        target: the class whose annotations say what may be built.
        given: arguments by name.
        trust: further trusted packages.
        key: config key of the arguments.
        outputs: as in `instantiate`.

    Raises:
        UserError: if something in it may not be built; nothing has been built then.
        Exception: that a constructor raises.
    """
    arguments, faults = parse_arguments(target, given, key, trust)
    raise_first(faults)
    made: dict[str, Any] = built(arguments, outputs)
    return made


def raise_first(faults: Iterable[Fault]) -> None:
    """Raise the first fault, if there is one, with its key.

    Args:
        faults: from `parse`.
    """
    for key, error in faults:
        raise type(error)(f"{key}: {error}")


def built(value: Any, outputs: Outputs | None = None) -> Any:
    """Return a value with the calls in it made, the inner ones first.

    Args:
        value: a value, a call, or mappings and lists of them.
        outputs: as in `instantiate`.
    """
    if isinstance(value, dict):
        return {name: built(inner, outputs) for name, inner in value.items()}
    if isinstance(value, list):
        return [built(inner, outputs) for inner in value]
    if not isinstance(value, Call):
        return value
    args, kwargs = built(value.args, outputs), built(value.kwargs, outputs)
    if outputs is not None:
        names = [name for name in value.hints if not name.startswith("*")]
        for index, name in enumerate(names[: len(args)]):
            args[index] = outputs.place(f"{value.key}.{name}", args[index], value.hints[name])
        for name, each in kwargs.items():
            kwargs[name] = outputs.place(f"{value.key}.{name}", each, value.hints.get(name, ()))
    return functools.partial(value.target, *args, **kwargs) if value.partial else value.target(*args, **kwargs)


def calls(value: Any) -> Iterator[Call]:
    """Yield the calls in a value, the outer ones first.

    Args:
        value: as for `built`.
    """
    if isinstance(value, Call):
        yield value
        yield from calls([value.args, value.kwargs])
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from calls(inner)


def unresolved(value: object, key: str) -> Iterator[Fault]:
    """Yield every text in a value that still has an interpolation.

    Args:
        value: mappings, lists and plain values.
        key: the value's config key.
    """
    parser = _Parser(())
    parser.value(value, key, [], depth=0, nodes=False)
    yield from parser.faults


class _Parser:
    def __init__(self, trust: tuple[str, ...]) -> None:
        self.trust = trust
        self.faults: list[Fault] = []
        self.size = 0
        self.too_large = False

    def refuse(self, key: str, text: str) -> None:
        self.faults.append((key, TrustError(text)))

    def value(self, value: Any, key: str, hints: list[Any], depth: int, *, nodes: bool = True) -> Any:
        """Return a plain value with its nodes replaced by calls."""
        self.size += 1
        if depth > DEPTH or self.size > SIZE:
            if not self.too_large:
                self.refuse(key, f"expected at most {DEPTH} levels and {SIZE} values, got more")
            self.too_large = True
            return None
        if isinstance(value, Mapping):
            if nodes and "_target_" in value:
                return self.node(value, key, hints, depth)
            inner = kinds.value_hints(hints)
            return {
                self.name(name, key): self.value(each, f"{key}.{name}", inner, depth + 1, nodes=nodes)
                for name, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [
                self.value(each, f"{key}[{index}]", kinds.item_hints(hints, index), depth + 1, nodes=nodes)
                for index, each in enumerate(value)
            ]
        return self.name(value, key)

    def name(self, value: Any, key: str) -> Any:
        """Check a single value, or a key of a mapping."""
        if isinstance(value, str) and "${" in value:
            self.refuse(
                key,
                f"expected a resolved value, got {value!r}: an interpolation is resolved once, and none may be left; "
                f"write the value itself",
            )
        elif not isinstance(value, str | int | float | None):
            self.refuse(
                key,
                f"expected a mapping, list, text, number, bool or null, got a {type(value).__name__}",
            )
        return value

    def node(self, node: Mapping[str, Any], key: str, hints: list[Any], depth: int) -> Call | None:
        whole, partly = kinds.classes(hints), kinds.returned_classes(hints)
        partial = node.get("_partial_", False)
        found = len(self.faults)
        if not isinstance(partial, bool):
            self.refuse(f"{key}._partial_", f"expected true or false, got {partial!r}")
        elif depth == 0 and partial != bool(partly):
            wanted = "expected true, since the parameters are passed later" if partly else "expected false"
            self.refuse(f"{key}._partial_", f"{wanted}; {'add it' if partly else 'remove it'}")
        if node.get("_recursive_", True) is not True:
            self.refuse(f"{key}._recursive_", "expected true: nodes inside a node are always built; remove it")
        bases = (*whole, *partly) if partial else whole
        if len(self.faults) == found and not bases:
            self.refuse(key, _no_class(node, key, hints))
        if len(self.faults) > found:
            return None
        try:
            target = resolve(node["_target_"], bases, self.trust)
        except UserError as error:
            about_kind = isinstance(error, TrustError) and str(error).startswith("expected a ")
            self.faults.append((key if about_kind else f"{key}._target_", error))
            return None
        if depth == 0 and target in bases:
            self.refuse(f"{key}._target_", f"expected a subclass of {target.__name__}, got the base class itself")
            return None
        return self.call(target, node, key, depth, partial=partial)

    def call(self, target: Any, node: Mapping[str, Any], key: str, depth: int, *, partial: bool) -> Call:
        by_name = argument_hints(target)
        star = next((hints for name, hints in by_name.items() if name.startswith("*")), [])
        by_place = [hints for name, hints in by_name.items() if not name.startswith("*")]
        args = node.get("_args_", [])
        if not isinstance(args, list | tuple):
            self.refuse(f"{key}._args_", f"expected a list, got {args!r}")
            args = []
        by_place += [[]] * (len(args) - len(by_place))
        positional = [
            self.value(each, f"{key}._args_[{index}]", [*by_place[index], *star], depth + 2)
            for index, each in enumerate(args)
        ]
        if not all(isinstance(name, str) for name in node):
            self.refuse(key, f"expected names of arguments as keys, got {list(node)!r}")
        named = {
            self.name(name, key): self.value(value, f"{key}.{name}", by_name.get(name, []), depth + 1)
            for name, value in node.items()
            if name not in NODE_KEYS
        }
        return Call(key, target, node, positional, named, by_name, partial)


def _no_class(node: Mapping[str, Any], key: str, hints: list[Any]) -> str:
    argument = key.rsplit(".", 1)[-1]
    wanted = f"expected {' or '.join(map(readable, hints))}, got" if hints else "expected a value, got"
    return (
        f"{wanted} a node with _target_ {node['_target_']!r}: an object is built only for an argument whose annotation "
        f"names its class, and that of {argument!r} does not"
    )
