"""Whether the copies of a node fit into its memory file system, and into its memory."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from stabletrain.core.bytes import shown
from stabletrain.runtime.checkpoints.memory.place import Place
from stabletrain.runtime.internals.free_memory import host_memory

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


def problem_of(place: Place, files: int, copies: int, leftovers: list[Path]) -> str | None:
    """Why a node has not enough memory; None if it has.

    Args:
        place: of the node.
        files: all files on the node at once, bytes.
        copies: from which its processes write, bytes.
        leftovers: folders of other runs on the file system.
    """
    present = place.nbytes()
    found = os.statvfs(place.node)
    room = found.f_bavail * found.f_frsize + present
    others = ""
    if leftovers:
        others = f". If their runs have ended, delete {', '.join(map(str, leftovers[:3]))}"
    remedy = (
        "Give the file system more room (a container: docker run --shm-size, or a volume of medium Memory in "
        "Kubernetes), use another folder (plugins.checkpoints.memory.folder), or train without copies in memory "
        f"(plugins.checkpoints.memory.every=null){others}"
    )
    if files > room:
        return f"{place.root} has room for {shown(room)}, and the copies of this node take {shown(files)}. {remedy}"
    free = host_memory()
    more = copies + (max(0, files - present) if is_in_memory(place.node) else 0)
    if more > free:
        return f"{shown(free)} of memory are free, and the copies of this node take {shown(more)} more. {remedy}"
    return None


def is_in_memory(folder: Path) -> bool:
    """Whether a folder is on a file system that takes main memory."""
    path = folder.resolve()
    mounts = [each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda each: len(each.mountpoint)).fstype in _IN_MEMORY
