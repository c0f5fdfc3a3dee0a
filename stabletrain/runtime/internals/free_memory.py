"""Free memory of the machine, of its container, and of a CUDA device."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def host_memory(cgroup: Path = _CGROUP) -> int:
    """Free main memory of this machine or container, in bytes.

    Args:
        cgroup: folder with the container's limits.
    """
    free = int(psutil.virtual_memory().available)
    left = _left_in_container(cgroup)
    return free if left is None else min(free, left)


def device_memory(device: torch.device) -> int:
    """Memory of a CUDA device, in bytes, that was free when this process used most of it.

    Memory that torch's allocator has reserved, and did not use then, is free. Between two steps more is free, which the
    next forward and backward pass need.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, int(free) + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device))


def _left_in_container(cgroup: Path) -> int | None:
    """Bytes left within a container's limit, with cached files counted as free; None if there is no limit."""
    version_2 = "memory.max", "memory.current", "memory.stat", "inactive_file"
    version_1 = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"
    for limit, usage, statistics, cached in (version_2, (*version_1, "total_inactive_file")):
        try:
            most, used = int((cgroup / limit).read_text()), int((cgroup / usage).read_text())
            pairs = (line.split() for line in (cgroup / statistics).read_text().splitlines())
            return most - used + next((int(value) for key, value in pairs if key == cached), 0)
        except (OSError, ValueError):  # the file is missing, or contains "max"
            continue
    return None
