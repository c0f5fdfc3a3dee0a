"""The state of the user's code in git, read so that nothing which the repository configures is run.

git runs programs that a repository's configuration names, even in ``git status``: ``core.fsmonitor``, hooks, filters,
``diff.external``, text conversions, the ssh command of a partial clone. Switching each of them off would miss the next
one. Here git works with a git directory of our own, which has an empty configuration, no hooks and no remotes; of the
repository's it sees the objects, the index, the commit and the list of ignored files.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

_DIFF_BYTES = 200_000
_STATUS_BYTES = 2_000_000
_MOST_UNTRACKED = 1_000
_SMALL_FILE = 5_000_000
_TIMEOUT = 20.0

# settings that say how files are compared; none of them names a program or a path
_HARMLESS = r"^core\.(autocrlf|eol|filemode|symlinks|ignorecase|precomposeunicode)$"
_WORD = re.compile(r"[a-z]+")
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class _Repository(NamedTuple):
    top: Path
    git_dir: Path
    common: Path  # differs from git_dir in a linked worktree
    branch: str | None
    sha: str | None


def git_state(path: str | Path, *, limit: int = _DIFF_BYTES) -> dict[str, Any]:
    """Return commit, branch and uncommitted changes of the repository that contains ``path``.

    Programs that the repository configures are not run, so files with a filter (git-lfs) are compared as they are.
    Changes inside of submodules are not seen, another commit of a submodule is.

    Args:
        path: a folder. Outside a repository (or without git) every value is None or empty.
        limit: maximum length of the diff in bytes; ``diff_truncated`` is True if it was longer, or git did not write
            all of it in 20 s. ``untracked_truncated`` is True if more files or folders are untracked than are listed.
    """
    nothing: dict[str, Any] = {
        "sha": None,
        "branch": None,
        "dirty": None,
        "diff": "",
        "diff_truncated": False,
        "untracked": [],
        "untracked_truncated": False,
    }
    return _with_git(Path(path), lambda git: _state(git, limit)) or nothing


def repository_of(path: str | Path) -> Path | None:
    """Return the top folder of the repository that holds a package; None if none does.

    An environment within a repository is not held by it: of what is installed, only files that are committed count.

    Args:
        path: the package's folder, or a module's file.
    """
    real = Path(os.path.realpath(path))  # unlike pathlib's methods, these do not raise
    folder = real if os.path.isdir(real) else real.parent
    is_installed = bool({"site-packages", "dist-packages"} & set(real.parts))
    kinds = ("--cached",) if is_installed else ("--cached", "--others", "--exclude-standard")

    def held(git: _Git) -> Path | None:
        within = os.path.relpath(real, git.repository.top)
        return git.repository.top if git.read("ls-files", "-z", *kinds, "--", within, limit=1) else None

    return _with_git(folder, held)


def _with_git(path: Path, read: Callable[[_Git], T]) -> T | None:
    """Call a function with the repository that contains a folder; None if there is none, or it is damaged."""
    tool = shutil.which("git")
    if tool is None or not os.path.isabs(tool):  # a relative one is in the current folder
        return None
    try:
        repository = _find(path.absolute())
        if repository is None:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            return read(_Git(tool, repository, Path(scratch)))
    except (OSError, ValueError, RuntimeError):  # of paths that a damaged repository names
        return None


class _Git:
    """Runs git on a repository's files with a git directory of our own."""

    def __init__(self, tool: str, repository: _Repository, scratch: Path) -> None:
        self.repository = repository
        self._tool = tool
        self._scratch = scratch
        (scratch / "refs").mkdir()
        (scratch / "info").mkdir()
        (scratch / "HEAD").write_text(repository.sha or "ref: refs/heads/none", encoding="utf-8")
        with (scratch / "config").open("w", encoding="utf-8") as file:
            sha256 = repository.sha is not None and len(repository.sha) == 64
            file.write(f"[core]\n\trepositoryformatversion = {int(sha256)}\n\tbare = false\n")
            file.write("[extensions]\n\tobjectFormat = sha256\n" if sha256 else "")
        for name in ("exclude", "attributes"):
            content = _small_file(repository.common / "info" / name)
            if content is not None:
                (scratch / "info" / name).write_bytes(content)
        for shared in repository.git_dir.glob("sharedindex.*"):
            (scratch / shared.name).symlink_to(shared.absolute())
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        self._environment = {
            **inherited,
            "GIT_DIR": str(scratch),
            "GIT_WORK_TREE": str(repository.top),
            "GIT_INDEX_FILE": str(repository.git_dir / "index"),
            "GIT_OBJECT_DIRECTORY": str(repository.common / "objects"),
            "GIT_LITERAL_PATHSPECS": "1",
            "GIT_OPTIONAL_LOCKS": "0",  # so that reading never blocks the user's own git commands
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_NO_LAZY_FETCH": "1",
        }
        self._settings = self._harmless_settings()

    def read(self, *arguments: str, limit: int) -> bytes | None:
        """Return at most ``limit`` + 1 bytes of git's output; None if it fails or takes too long."""
        no_programs = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
        options = ("-c", "diff.autoRefreshIndex=false", "-c", f"core.hooksPath={os.devnull}", *self._settings)
        return self._run((*options, *arguments), no_programs, limit)

    def _harmless_settings(self) -> tuple[str, ...]:
        # the user's own configuration is read with its includes, the repository's as one file without them
        found: dict[str, str] = {}
        excludes = r"^core\.excludesfile$"
        outputs = [self._run(("config", "--null", "--get-regexp", f"{_HARMLESS}|{excludes}"), {}, _SMALL_FILE) or b""]
        config = self.repository.common / "config"
        if _is_small_file(config):
            theirs = ("config", "--null", "--file", str(config), "--no-includes", "--get-regexp", _HARMLESS)
            outputs.append(self._run(theirs, {}, _SMALL_FILE) or b"")
        for output in outputs:
            for entry in output.decode(errors="replace").split("\0"):
                key, _, value = entry.partition("\n")
                if key == "core.excludesfile" or _WORD.fullmatch(value):
                    found[key] = value
        return tuple(word for key, value in found.items() for word in ("-c", f"{key}={value}"))

    def _run(self, arguments: tuple[str, ...], environment: Mapping[str, str], limit: int) -> bytes | None:
        process = subprocess.Popen(
            [self._tool, "--no-pager", *arguments],
            cwd=self.repository.top,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**self._environment, **environment},
        )
        timer = threading.Timer(_TIMEOUT, process.kill)
        timer.start()
        try:
            with process:
                assert process.stdout is not None
                output = process.stdout.read(limit + 1)
                if len(output) > limit:
                    process.kill()
                    return output
                code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
        return output if code == 0 else None


def _state(git: _Git, limit: int) -> dict[str, Any]:
    submodules = "--ignore-submodules=dirty"  # git would run in them, with their own configuration
    status = git.read(
        "status", "--porcelain", "-z", "--no-renames", "--untracked-files=normal", submodules, limit=_STATUS_BYTES
    )
    sha = git.repository.sha
    base = "HEAD" if sha else "--cached"
    shape = ("--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short", submodules)
    found = None if status is None else git.read("diff", *shape, base, "--", limit=limit)
    diff = found or b""
    entries = [entry.decode(errors="replace") for entry in (status or b"").split(b"\0")]
    untracked = [entry[3:] for entry in entries if entry.startswith("?? ")]
    return {
        "sha": sha,
        "branch": git.repository.branch,
        "dirty": None if status is None else bool(status),
        "diff": diff[:limit].decode(errors="replace").rstrip("\n"),
        "diff_truncated": len(diff) > limit or (found is None and status != b""),
        "untracked": untracked[:_MOST_UNTRACKED],
        "untracked_truncated": len(untracked) > _MOST_UNTRACKED or len(status or b"") > _STATUS_BYTES,
    }


def _find(path: Path) -> _Repository | None:
    for top in (path, *path.parents):
        git_dir = _git_dir(top)
        if git_dir is None:
            continue
        head = _line(git_dir / "HEAD")
        if head is None:
            continue
        shared = _line(git_dir / "commondir")
        common = git_dir if shared is None else (git_dir / shared).resolve()
        if not (common / "objects").is_dir():
            continue
        if not head.startswith("ref: "):
            return _Repository(top, git_dir, common, None, head if _SHA.fullmatch(head) else None)
        name = head.removeprefix("ref: ").strip()
        return _Repository(top, git_dir, common, name.removeprefix("refs/heads/"), _commit(name, git_dir, common))
    return None


def _git_dir(top: Path) -> Path | None:
    inside = top / ".git"
    if inside.is_dir():
        return inside
    line = _line(inside)
    if line is None or not line.startswith("gitdir: "):
        return None
    return (top / line.removeprefix("gitdir: ")).resolve()


def _commit(name: str, git_dir: Path, common: Path) -> str | None:
    """The commit of a reference, from its file or from the table of packed references."""
    if not name.startswith("refs/") or ".." in name:
        return None
    for folder in (git_dir, common):
        found = _line(folder / name)
        if found is not None and _SHA.fullmatch(found):
            return found
    packed = _small_file(common / "packed-refs", 200_000_000) or b""
    match = re.search(rb"(?m)^([0-9a-f]{40}|[0-9a-f]{64}) " + re.escape(name.encode()) + rb"\r?$", packed)
    return match[1].decode() if match else None


def _line(path: Path) -> str | None:
    content = _small_file(path, 10_000)
    return None if content is None or b"\0" in content else content.decode(errors="replace").strip()


def _small_file(path: Path, limit: int = _SMALL_FILE) -> bytes | None:
    try:
        return path.read_bytes() if _is_small_file(path, limit) else None
    except (OSError, ValueError):
        return None


def _is_small_file(path: Path, limit: int = _SMALL_FILE) -> bool:
    # a named pipe would hang whoever opens it
    try:
        found = path.stat()
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size <= limit
