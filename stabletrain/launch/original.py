"""The packages and the code of a recorded run: what differs here, and the commands that would restore them.

Nothing is installed or checked out. What the commands name is written to ``original/`` in the new run's folder.
"""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from stabletrain.launch.segments import Segment
from stabletrain.tracking.git import git_state
from stabletrain.tracking.record import packages

FOLDER = "original"
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LARGEST = 2_000_000


class Restore(NamedTuple):
    """One command that would restore a part of what the original ran with, and why."""

    command: str
    reason: str


def restore_commands(segment: Segment, folder: Path, code: Path) -> list[Restore]:
    """Write the original's requirements and diff to the new run's folder, and return the commands that would use them.

    Args:
        segment: of the original.
        folder: of the new run.
        code: the folder of the user's code now.
    """
    return [*_packages(segment, folder), *_code(segment, folder, code)]


def _packages(segment: Segment, folder: Path) -> list[Restore]:
    lines = _text(segment, "environment/requirements.txt").splitlines()
    # only names and versions: a line of a requirements file may name another index, or a path
    wanted = {match[1]: match[2] for line in lines if (match := _REQUIREMENT.fullmatch(line.strip()))}
    here = packages()
    different = sorted(name for name, version in wanted.items() if here.get(name) != version)
    if not different:
        return []
    path = _write(folder / FOLDER / "requirements.txt", "".join(f"{name}=={wanted[name]}\n" for name in wanted))
    count = f"{len(different)} package has" if len(different) == 1 else f"{len(different)} packages have"
    named = ", ".join(f"{name} {wanted[name]} (here {here.get(name, 'none')})" for name in different[:3])
    return [Restore(shlex.join(["pip", "install", "-r", str(path)]), f"{count} another version: {named}")]


def _code(segment: Segment, folder: Path, code: Path) -> list[Restore]:
    recorded = segment.json("environment/git.json") or {}
    sha = recorded.get("sha")
    if not isinstance(sha, str) or not _SHA.fullmatch(sha):
        return []
    here = git_state(code)
    diff = _text(segment, "environment/git.diff").rstrip("\n")
    found = []
    if here["sha"] != sha:
        found.append(Restore(f"git switch --detach {sha}", f"the commit here is {(here['sha'] or 'none')[:12]}"))
    if diff and (here["sha"] != sha or here["diff"] != diff):
        path = _write(folder / FOLDER / "git.diff", diff + "\n")
        cut = ", of which the end is not recorded" if recorded.get("diff_truncated") else ""
        found.append(Restore(shlex.join(["git", "apply", str(path)]), f"it had changes that were not committed{cut}"))
    return found


def _text(segment: Segment, name: str) -> str:
    path = segment.file(name)
    with suppress(OSError):
        if path is not None and path.is_file() and path.stat().st_size <= _LARGEST:
            return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _write(path: Path, text: str) -> Path:
    with suppress(OSError):  # the command then names a file that is missing, which is said by the command
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path
