"""The packages and the code of a recorded run: what differs here, and the commands that would restore them.

Nothing is installed or checked out. What the commands name is written to ``original/`` in the new run's folder.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stabletrain.launch.segments import Segment
from stabletrain.tracking.code_files import package_paths
from stabletrain.tracking.git import git_state, repository_of
from stabletrain.tracking.record import packages

FOLDER = "original"
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DIFF = re.compile(r"git(-\w+)?\.diff")
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
    others = recorded.get("repositories")
    found = _repository(segment, folder, {"diff": "git.diff", **_of_folder(recorded)}, code)
    for each in others if isinstance(others, list) else ():
        names = each.get("packages") if isinstance(each, Mapping) else None
        package = names[0] if isinstance(names, list) and names else None
        if not isinstance(package, str) or not package.isidentifier() or each.get("sha") == recorded.get("sha"):
            continue
        tops = [top for path in package_paths(package) if (top := repository_of(path)) is not None]
        found += _repository(segment, folder, each, tops[0], package) if tops else []
    return found


def _of_folder(recorded: Mapping[str, Any]) -> dict[str, Any]:
    return {key: recorded.get(key) for key in ("sha", "diff_truncated")}


def _repository(
    segment: Segment, folder: Path, recorded: Mapping[str, Any], code: Path, package: str = ""
) -> list[Restore]:
    """The commands for one repository; of a package, in the folder of its repository here."""
    sha, name = recorded.get("sha"), recorded.get("diff")
    if not isinstance(sha, str) or not _SHA.fullmatch(sha):
        return []
    here = git_state(code)
    diff = _text(segment, f"environment/{name}").rstrip("\n") if isinstance(name, str) and _DIFF.fullmatch(name) else ""
    git = ["git", "-C", str(code)] if package else ["git"]
    of = f" of {package}" if package else ""
    found = []
    if here["sha"] != sha:
        reason = f"the commit{of} here is {(here['sha'] or 'none')[:12]}"
        found.append(Restore(shlex.join([*git, "switch", "--detach", sha]), reason))
    if diff and (here["sha"] != sha or here["diff"] != diff):
        path = _write(folder / FOLDER / str(name), diff + "\n")
        cut = ", of which the end is not recorded" if recorded.get("diff_truncated") else ""
        reason = f"there were changes{of} that were not committed{cut}"
        found.append(Restore(shlex.join([*git, "apply", str(path)]), reason))
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
