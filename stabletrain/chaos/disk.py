"""A full disk, simulated for this process and one folder."""

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
    """Writing to files in a folder fails with ENOSPC, "no space left on device".

    This affects writes of this process through Python: ``open``, ``os.write`` and similar functions, moving files into
    the folder, and ``torch.save`` to a path. Other processes, and libraries that write with their own code, are not
    affected. The fault lasts until the batch after the affected steps starts, so it affects checkpoints that are saved
    at the end of such a step, too.

    Args:
        at_step: first attempted optimizer step with the fault, from 0.
        steps: number of attempted steps with the fault, >= 1.
        free: bytes that can still be written once the fault has begun, >= 0.
        folder: the folder; None: ``Trainer.default_root_dir``.
        rank: the only rank with the fault; None: all ranks.
        once: apply the fault to each step only once, even if a rollback or a resumed run repeats the step.

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

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log the fault."""
        self.log_fault(trainer, step, f"no space left in {self.folder or trainer.default_root_dir}")

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Replace the functions that write."""
        self.undo_later(NoSpace(Path(self.folder or trainer.default_root_dir), self.free).install())


class NoSpace:
    """Replacements of the functions that write files.

    Args:
        folder: the folder with the simulated full disk.
        free: bytes that can still be written in it.
    """

    def __init__(self, folder: Path, free: int) -> None:
        self._folder = os.path.realpath(folder)
        self._free = free

    def install(self) -> Callable[[], None]:
        """Replace the functions; return a function that restores them.

        Raises:
            UserError: if another `NoSpace` is installed.
        """
        if isinstance(getattr(builtins.open, "__self__", None), NoSpace):
            raise UserError(
                "FullDisk: another FullDisk is active; choose steps that do not overlap (config key chaos.at_step)"
            )
        self._open, self._write, self._save = builtins.open, os.write, torch.save
        replaced: list[tuple[Any, str, Any]] = [
            (builtins, "open", self.open),
            (io, "open", self.open),
            (os, "write", self.write),
            (torch, "save", self.save),
        ]
        replaced += [
            (os, name, self._limited(getattr(os, name), index))
            for name, index in (("sendfile", 0), ("copy_file_range", 1), ("posix_fallocate", 0), ("pwrite", 0))
            if hasattr(os, name)
        ]
        replaced += [(os, name, self._limited_move(getattr(os, name))) for name in ("rename", "replace")]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        for owner, name, new in replaced:
            setattr(owner, name, new)

        def undo() -> None:
            for owner, name, old in before:
                setattr(owner, name, old)

        return undo

    def covers(self, file: Any) -> bool:
        """Return whether a path or file descriptor is in the folder."""
        try:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.realpath(os.fspath(file))
        except (OSError, TypeError, ValueError):
            return False
        path = os.fsdecode(path)
        return path == self._folder or path.startswith(self._folder + os.sep)

    def use(self, size: int) -> None:
        """Reduce the number of free bytes.

        Args:
            size: in bytes.

        Raises:
            OSError: if fewer are free.
        """
        if size > self._free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._free -= size

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Like the built-in; a file in the folder that is opened for writing is limited to the free bytes."""
        opened = self._open(file, mode, *args, **kwargs)
        writes = any(sign in mode for sign in "wax+")
        return _Limited(opened, self) if writes and self.covers(file) else opened

    def write(self, fd: int, data: Any) -> int:
        """Like ``os.write``."""
        if self.covers(fd):
            self.use(memoryview(data).nbytes)
        return self._write(fd, data)

    def save(self, obj: object, f: Any, *args: Any, **kwargs: Any) -> None:
        """Like ``torch.save``, which would open a path with its own code."""
        if isinstance(f, str | os.PathLike) and self.covers(f):
            with self.open(f, "wb") as file:
                self._save(obj, file, *args, **kwargs)
        else:
            self._save(obj, f, *args, **kwargs)

    def _limited_move(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A rename that needs space if the source is outside the folder, such as a temporary file."""

        def function(source: Any, target: Any, **kwargs: Any) -> Any:
            if self.covers(target) and not self.covers(source):
                self.use(os.stat(source).st_size)
            return inner(source, target, **kwargs)

        return function

    def _limited(self, inner: Callable[..., Any], index: int) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            if len(args) > index and self.covers(args[index]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return inner(*args, **kwargs)

        return function


class _Limited:
    """A file that can be written while bytes are free."""

    def __init__(self, file: Any, space: NoSpace) -> None:
        self._file = file
        self._space = space

    def write(self, data: Any) -> Any:
        self._space.use(len(data.encode()) if isinstance(data, str) else memoryview(data).nbytes)
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
