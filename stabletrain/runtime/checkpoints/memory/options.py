"""The argument ``memory`` of `SaveCheckpoints`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from stabletrain.errors import UserError, did_you_mean
from stabletrain.settings import worded

FOLDER = Path("/dev/shm")
"""Where Linux has a memory file system."""
_KEY = "plugins.checkpoints.memory"

Every: TypeAlias = int | Literal["auto"]


@dataclass(frozen=True)
class MemoryOptions:
    """How often, where and how often again the state is copied into the nodes' memory.

    Args:
        every: applied steps between two copies, >= 1; ``"auto"``: as often as costs at most 2 % of the steps' time;
            None: never.
        folder: on a memory file system of each node; None: ``/dev/shm``.
        copies: how many other nodes keep the part of each process, >= 1; a run on one node has none.
    """

    every: Every | None = None
    folder: str | None = None
    copies: int = 1

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> MemoryOptions:
        """The options in a mapping, of which any may be missing.

        Raises:
            UserError: for an unknown option, or one out of range.

        >>> MemoryOptions.of({"every": 50})
        MemoryOptions(every=50, folder=None, copies=1)
        """
        if given is not None and not isinstance(given, Mapping):
            raise _error(f"memory must be a mapping such as {{'every': 50}}, got {given!r}", _KEY)
        known = {name: (given or {}).get(name, default) for name, default in OFF.items()}
        for name in given or {}:
            if name not in known:
                expected = f"expected {', '.join(known)}{did_you_mean(str(name), known)}"
                raise _error(f"memory has no option {name!r}; {expected}", _KEY)
        every, folder, copies = known.values()
        is_step = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        for ok, name, wanted, got in (
            (every in (None, "auto") or is_step, "every", "applied steps >= 1, auto, or null for no copies", every),
            (folder is None or (isinstance(folder, str | Path) and str(folder)), "folder", "a path, or null", folder),
            (type(copies) is int and copies >= 1, "copies", "a number of nodes >= 1", copies),
        ):
            if not ok:
                raise _error(f"memory.{name} must be {wanted}, got {got!r}", f"{_KEY}.{name}")
        return cls(every, None if folder is None else str(folder), copies)

    def as_dict(self) -> dict[str, Any]:
        """The options by name."""
        return asdict(self)

    @property
    def root(self) -> Path:
        """The folder, absolute."""
        return FOLDER if self.folder is None else Path(self.folder).expanduser().absolute()


def _error(text: str, key: str) -> UserError:
    return UserError(worded(f"checkpoints: {text} (config key {key})", "checkpoints", "SaveCheckpoints"))


OFF: Mapping[str, Any] = MappingProxyType(asdict(MemoryOptions()))
"""The options of a run without copies in memory."""
