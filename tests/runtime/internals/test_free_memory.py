"""A container's share of the machine counts, not the machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from stabletrain.runtime.internals.free_memory import host_memory

MIB = 1 << 20


@pytest.mark.parametrize(
    ("folder", "limit", "usage", "statistics", "cached"),
    [
        ("", "memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
    ],
)
def test_a_containers_limit_counts(
    tmp_path: Path, folder: str, limit: str, usage: str, statistics: str, cached: str
) -> None:
    # catches a run that is killed in its container while the machine has memory left
    where = tmp_path / folder
    where.mkdir(exist_ok=True)
    (where / limit).write_text(f"{64 * MIB}\n")
    (where / usage).write_text(f"{40 * MIB}\n")
    (where / statistics).write_text(f"anon 1\n{cached} {16 * MIB}\nfile 3\n")
    assert host_memory(tmp_path) == 40 * MIB


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    # catches "max" read as a number, and a system without control groups
    machine = psutil.virtual_memory().total
    for content in (None, "max\n", f"{1 << 62}\n"):
        if content is not None:
            (tmp_path / "memory.max").write_text(content)
            (tmp_path / "memory.current").write_text("1\n")
            (tmp_path / "memory.stat").write_text("inactive_file 0\n")
        assert 0 < host_memory(tmp_path) <= machine
