"""A plugin under test: its options, and new objects built from them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabletrain.config.construct import instantiate
from stabletrain.config.discovery import Option, PluginInfo
from stabletrain.config.trust import resolve
from stabletrain.errors import UserError
from stabletrain.testing.failure import wrong


@dataclass(frozen=True)
class Subject:
    """The plugin that the checks test.

    Args:
        plugin: as found by `stabletrain.config.discovery`.
    """

    plugin: PluginInfo
    _nodes: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def options(self) -> tuple[Option, ...]:
        """The plugin's options, without the option ``none`` of its slot."""
        return tuple(option for option in self.plugin.options if option.name != "none")

    def node(self, option: Option) -> Any:
        """Return the content of an option's file, without values that contain interpolations."""
        key = str(option.file)
        if key not in self._nodes:
            self._nodes[key] = _without_interpolations(_loaded(option.file))
        return self._nodes[key]

    def targets(self, option: Option) -> Iterator[Mapping[str, Any]]:
        """Yield every node of an option whose ``_target_`` is in this plugin's distribution or in stabletrain."""
        packages = {"stabletrain", "stabletrain_plugins", self.plugin.package.split(".")[0]}
        for node in _with_target(self.node(option)):
            if str(node["_target_"]).split(".")[0] in packages:
                yield node

    def build(self, option: Option) -> Any:
        """Build a new object from an option."""
        return instantiate(self.node(option), trust=self.trust, key=choice(option))

    @property
    def refuses_toy(self) -> bool:
        """Whether it refuses steps of one micro-batch, or a module without attention (attributes of its class)."""
        if self.plugin.kind != "callback":
            return False
        built = [self.build(option) for option in self.options]
        return any(getattr(b, "least_micro_batches", 1) > 1 or getattr(b, "needs_attention", False) for b in built)

    def plain_option(self) -> Option:
        """Return the option closest to the constructor's defaults."""
        return min(self.options, key=lambda option: len(self.differences(option)))

    def parameters(self, node: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
        """Return the parameters of a node's target that the node must set, by name.

        Args:
            node: a mapping with ``_target_``. With ``_partial_``, parameters without a default are omitted: they are
                passed later, as an optimizer's parameters are.
        """
        target = self.resolve(node["_target_"])
        return {
            name: parameter
            for name, parameter in inspect.signature(target).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and not (node.get("_partial_") and parameter.default is parameter.empty and name not in node)
        }

    def differences(self, option: Option) -> list[str]:
        """Return the values of an option that are not the default of their parameter, each as a text."""
        found = []
        for node in self.targets(option):
            for name, parameter in self.parameters(node).items():
                if name in node and parameter.default is not parameter.empty:
                    value, default = node[name], parameter.default
                    if _comparable(value) != _comparable(default):
                        found.append(f"{name}: {value!r} in the file, {default!r} in the signature")
        return found

    def representatives(self) -> list[Option]:
        """Return one option for each ``_target_``: of options that differ in values only, one is enough."""
        found: dict[object, Option] = {}
        for option in (self.plain_option(), *self.options):
            found.setdefault(tuple(str(node["_target_"]) for node in self.targets(option)), option)
        return list(found.values())

    @property
    def trust(self) -> tuple[str, ...]:
        """The plugin's top-level package, which its options may name."""
        return (self.plugin.package.split(".")[0],)

    def resolve(self, target: object) -> Any:
        """Return the object that a ``_target_`` names."""
        try:
            return resolve(target, [object], self.trust)
        except UserError as error:
            wrong(f"_target_ {target!r} to name a public class or function", str(error))


def choice(option: Option) -> str:
    """Return an option as typed on the command line, such as ``plugins/clip=zscore``."""
    return f"{option.group}={option.name}"


def _loaded(file: Path) -> Any:
    """The content of a config file, merged with the options of its own group in its defaults list."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    if not isinstance(plain, dict) or "defaults" not in plain:
        return plain
    entries, own = plain.pop("defaults"), plain
    if "_self_" not in entries:
        entries = [*entries, "_self_"]
    merged: dict[Any, Any] = {}
    for entry in entries:
        if not isinstance(entry, str):
            wrong(f"the defaults of {file} to name options of its own group", repr(entry))
        merged.update(own if entry == "_self_" else _loaded(file.parent / f"{entry.removesuffix('.yaml')}.yaml"))
    return merged


def _with_target(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from _with_target(value)
    elif isinstance(node, list):
        for value in node:
            yield from _with_target(value)


def _without_interpolations(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {
            key: _without_interpolations(value)
            for key, value in node.items()
            if not (isinstance(value, str) and "${" in value)
        }
    return node


def _comparable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_comparable(item) for item in value)
    if isinstance(value, Mapping):
        return {str(key): _comparable(item) for key, item in value.items()}
    if isinstance(value, bool):  # True == 1, but a default of True written as 1 is a mistake
        return ("bool", value)
    return value
