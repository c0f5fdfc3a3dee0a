"""The error of this package."""

from __future__ import annotations

from stabletrain.errors import UserError


class CheckpointError(UserError):
    """A checkpoint holds something that cannot be stored, or cannot be read."""
