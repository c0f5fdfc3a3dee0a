"""Base class of plugins with arguments: name, slot and arguments."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from stabletrain.errors import require
from stabletrain.settings import worded


class Plugin:
    """Base of rules and transforms: a plugin whose arguments are the fields of a dataclass.

    It has no field of its own, not even ``name``, so a subclass may be a frozen dataclass or not.
    """

    plugin: ClassVar[str]
    """Name of the plugin, such as ``clip_norm``."""
    slot: ClassVar[str]
    """The plugin's slot in the config, such as ``clip``."""
    clips: ClassVar[bool] = False
    """Whether it clips gradients; then the Trainer's own ``gradient_clip_val`` is an error."""

    name: str | None
    """Name in events and checkpoints, needed if a run has two instances of a plugin; a field of the subclass."""

    @property
    def label(self) -> str:
        """The name used in events and checkpoints."""
        return self.name or self.plugin

    def arguments(self) -> dict[str, Any]:
        """The hyper-parameters, as given; `name` excluded."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}  # type: ignore[arg-type]

    def require(self, ok: bool, argument: str, expected: str) -> None:
        """Raise an error that names a hyper-parameter, unless it is valid.

        Raises:
            UserError: unless ``ok``.
        """
        node, name = f"plugins.{self.slot}", self.class_name
        require(ok, self.plugin, argument, expected, getattr(self, argument), node, name)

    def setting(self, argument: str) -> str:
        """The config key of an argument, or in a script ``Class(argument=...)``, to begin a message with."""
        return worded(f"plugins.{self.slot}.{argument}", self.slot, self.class_name)

    @property
    def class_name(self) -> str:
        """The name of the public class: that of the callback, also for the rule that it is made from."""
        return type(self).__name__.removesuffix("Rule")
