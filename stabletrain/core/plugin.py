"""What a plugin with arguments knows about itself: who it is, where its arguments are configured, and what they are."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from stabletrain.errors import require


class Plugin:
    """Base of rules and transforms: a plugin whose arguments are the fields of a dataclass.

    It has no field of its own, not even ``name``, so a subclass may be a frozen dataclass or not.
    """

    plugin: ClassVar[str]
    """Name of the plugin, such as ``clip_norm``."""
    slot: ClassVar[str]
    """The slot of the configuration that it fills, such as ``clip``."""
    clips: ClassVar[bool] = False
    """It may change the gradient, and so excludes the Trainer's own ``gradient_clip_val``."""

    name: str | None
    """What checkpoints and events call it, where one run has two of a kind; a field of the subclass."""

    @property
    def label(self) -> str:
        """The name used in events and checkpoints."""
        return self.name or self.plugin

    def arguments(self) -> dict[str, Any]:
        """The hyper-parameters, as given; `name` excluded."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}  # type: ignore[arg-type]

    def require(self, ok: bool, argument: str, expected: str) -> None:
        """Refuse a hyper-parameter with one message that names it.

        Raises:
            UserError: unless ``ok``.
        """
        require(ok, self.plugin, argument, expected, getattr(self, argument), f"plugins.{self.slot}")
