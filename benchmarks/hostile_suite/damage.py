"""Damage to the files of a checkpoint, as disks, copies and killed processes do it: its checksums no longer fit."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random

FILES = ("manifest.json", "state.json", "tensors.safetensors")

Damage = Callable[[Path, Path, str, Random], None]
"""Damages a file: gets the checkpoint's folder, that of an undamaged one, the name of the file, and a generator."""


def flip(folder: Path, other: Path, name: str, generator: Random) -> None:
    raw = bytearray((folder / name).read_bytes())
    bit = generator.randrange(len(raw) * 8)
    raw[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(raw)


def cut(folder: Path, other: Path, name: str, generator: Random) -> None:
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: generator.randrange(len(raw))])


def zeroed(folder: Path, other: Path, name: str, generator: Random) -> None:
    raw = bytearray((folder / name).read_bytes())
    start = generator.randrange(len(raw))
    raw[start : start + 512] = bytes(len(raw[start : start + 512]))
    (folder / name).write_bytes(raw)


def zeroed_whole(folder: Path, other: Path, name: str, generator: Random) -> None:
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))


def noise(folder: Path, other: Path, name: str, generator: Random) -> None:
    (folder / name).write_bytes(generator.randbytes((folder / name).stat().st_size))


def appended(folder: Path, other: Path, name: str, generator: Random) -> None:
    with (folder / name).open("ab") as file:
        file.write(generator.randbytes(generator.randrange(1, 4096)))


def sparse(folder: Path, other: Path, name: str, generator: Random) -> None:
    os.truncate(folder / name, 1 << generator.randrange(30, 42))


def empty(folder: Path, other: Path, name: str, generator: Random) -> None:
    (folder / name).write_bytes(b"")


def removed(folder: Path, other: Path, name: str, generator: Random) -> None:
    (folder / name).unlink()


def renamed(folder: Path, other: Path, name: str, generator: Random) -> None:
    (folder / name).rename(folder / f"{name}.part")


def duplicated(folder: Path, other: Path, name: str, generator: Random) -> None:
    shutil.copy(folder / name, folder / f"copy of {name}")


def of_another_checkpoint(folder: Path, other: Path, name: str, generator: Random) -> None:
    shutil.copy(other / name, folder / name)


def swapped_with_another_file(folder: Path, other: Path, name: str, generator: Random) -> None:
    shutil.copy(folder / generator.choice([each for each in FILES if each != name]), folder / name)


def pipe(folder: Path, other: Path, name: str, generator: Random) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def unix_socket(folder: Path, other: Path, name: str, generator: Random) -> None:
    (folder / name).unlink()
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(folder, os.O_RDONLY)  # the path itself may be too long for a socket
        made.bind(f"/proc/self/fd/{here}/{name}")
        os.close(here)


def a_folder(folder: Path, other: Path, name: str, generator: Random) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def link(folder: Path, other: Path, name: str, generator: Random) -> None:
    (folder / name).unlink()
    targets = [other / name, Path("/dev/zero"), Path("/etc/passwd"), Path(name), Path("nothing"), Path("/proc/kmsg")]
    (folder / name).symlink_to(generator.choice(targets))


def linked_copy(folder: Path, other: Path, name: str, generator: Random) -> None:
    """The right content, but elsewhere: a link is refused also then."""
    elsewhere = folder.parent / f"elsewhere-{name}"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)


def killed_after(folder: Path, other: Path, name: str, generator: Random) -> None:
    """As if the files had been written in place, and the process was killed when this one was half written."""
    order = ("tensors.safetensors", "state.json", "manifest.json")
    for each in order[order.index(name) :]:
        if each == name:
            os.truncate(folder / each, (folder / each).stat().st_size // 2)
        else:
            (folder / each).unlink()


def linked_folder(folder: Path, other: Path, name: str, generator: Random) -> None:
    elsewhere = folder.parent / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def nothing_in_it(folder: Path, other: Path, name: str, generator: Random) -> None:
    for each in FILES:
        (folder / each).unlink()


DAMAGES: tuple[Damage, ...] = (
    flip,
    cut,
    zeroed,
    zeroed_whole,
    noise,
    appended,
    sparse,
    empty,
    removed,
    renamed,
    duplicated,
    of_another_checkpoint,
    swapped_with_another_file,
    pipe,
    unix_socket,
    a_folder,
    link,
    linked_copy,
    killed_after,
    linked_folder,
    nothing_in_it,
)
