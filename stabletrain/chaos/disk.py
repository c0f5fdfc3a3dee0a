"""A disk that is full, for this process and one folder, without filling any disk."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer

from stabletrain.chaos.fault import Fault
from stabletrain.errors import UserError


class FullDisk(Fault):
    """Writing below a folder fails with ENOSPC, "no space left on device".

    What this process writes through Python is refused: ``open``, ``os.write`` and their kin, moving files in, and
    ``torch.save`` to a path. Other processes, and libraries that write by their own code, are not. The fault lasts
    until the first batch after the struck steps begins, so checkpoints saved at the end of a struck step meet it.

    Args:
        at_step: first attempted optimizer step that is struck, from 0.
        steps: how many attempted steps are struck, >= 1.
        free: bytes that can still be written when the fault begins, >= 0.
        folder: the folder; None: the run's (``Trainer.default_root_dir``).
        rank: the only rank that is struck; None: all.
        once: strike each step once only, also when a rollback or a resumed run comes to it again.

    Raises:
        UserError: if an argument is out of range.
    """

    lingers: ClassVar[bool] = True

    def __init__(
        self,
        at_step: int,
        steps: int = 1,
        free: int = 0,
        folder: str | None = None,
        rank: int | None = None,
        once: bool = True,
    ) -> None:
        super().__init__(at_step, steps, rank, once)
        self.free = free
        self.folder = folder
        self.require(free >= 0, "free", ">= 0")

    def strike(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Say so."""
        self.say(trainer, step, f"no space left below {self.folder or trainer.default_root_dir}")

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Replace the functions that write."""
        self.later(NoSpace(Path(self.folder or trainer.default_root_dir), self.free).install())


class NoSpace:
    """The replaced functions.

    Args:
        folder: below which nothing can be written.
        free: bytes that can be.
    """

    def __init__(self, folder: Path, free: int) -> None:
        self._folder = os.path.realpath(folder)
        self._free = free

    def install(self) -> Callable[[], None]:
        """Begin; returns the function that ends it.

        Raises:
            UserError: if another one has begun.
        """
        if isinstance(getattr(builtins.open, "__self__", None), NoSpace):
            raise UserError("FullDisk: another one is at work; give their steps no overlap (config key chaos.at_step)")
        self._open, self._write, self._save = builtins.open, os.write, torch.save
        replaced: list[tuple[Any, str, Any]] = [
            (builtins, "open", self.open),
            (io, "open", self.open),
            (os, "write", self.write),
            (torch, "save", self.save),
        ]
        replaced += [
            (os, name, self._refusing(getattr(os, name), place))
            for name, place in (("sendfile", 0), ("copy_file_range", 1), ("posix_fallocate", 0), ("pwrite", 0))
            if hasattr(os, name)
        ]
        replaced += [(os, name, self._keeping_out(getattr(os, name))) for name in ("rename", "replace")]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        for owner, name, new in replaced:
            setattr(owner, name, new)

        def undo() -> None:
            for owner, name, old in before:
                setattr(owner, name, old)

        return undo

    def covers(self, file: Any) -> bool:
        """Whether a path or file descriptor lies below the folder."""
        try:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.realpath(os.fspath(file))
        except (OSError, TypeError, ValueError):
            return False
        path = os.fsdecode(path)
        return path == self._folder or path.startswith(self._folder + os.sep)

    def take(self, size: int) -> None:
        """Use up free bytes.

        Raises:
            OSError: if there are not so many left.
        """
        if size > self._free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._free -= size

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """As the built-in, but what is opened to be written below the folder is limited."""
        opened = self._open(file, mode, *args, **kwargs)
        writes = any(sign in mode for sign in "wax+")
        return _Limited(opened, self) if writes and self.covers(file) else opened

    def write(self, fd: int, data: Any) -> int:
        """As ``os.write``."""
        if self.covers(fd):
            self.take(memoryview(data).nbytes)
        return self._write(fd, data)

    def save(self, obj: object, f: Any, *args: Any, **kwargs: Any) -> None:
        """As ``torch.save``, which would open a path by its own code."""
        if isinstance(f, str | os.PathLike) and self.covers(f):
            with self.open(f, "wb") as file:
                self._save(obj, file, *args, **kwargs)
        else:
            self._save(obj, f, *args, **kwargs)

    def _keeping_out(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A move from elsewhere needs space too: what was written to a temporary folder cannot slip in."""

        def function(source: Any, target: Any, **kwargs: Any) -> Any:
            if self.covers(target) and not self.covers(source):
                self.take(os.stat(source).st_size)
            return inner(source, target, **kwargs)

        return function

    def _refusing(self, inner: Callable[..., Any], place: int) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            if len(args) > place and self.covers(args[place]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return inner(*args, **kwargs)

        return function


class _Limited:
    """A file that can be written as long as there is space."""

    def __init__(self, file: Any, space: NoSpace) -> None:
        self._file = file
        self._space = space

    def write(self, data: Any) -> Any:
        self._space.take(len(data.encode()) if isinstance(data, str) else memoryview(data).nbytes)
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _Limited:
        self._file.__enter__()
        return self

    def __exit__(self, *args: Any) -> Any:
        return self._file.__exit__(*args)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
