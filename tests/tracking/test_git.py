"""Reading the state of a repository runs nothing that the repository configures."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stabletrain.tracking.git import git_state

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always", "-c", "commit.gpgsign=0")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *IDENTITY, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch, tmp_path):
    """The developer's own configuration plays no part."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def repository(tmp_path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-b", "trunk")
    (folder / "a.txt").write_text("one\n")
    git(folder, "add", "a.txt")
    git(folder, "commit", "-m", "first")
    (folder / "a.txt").write_text("two\n")  # so that it must be compared
    return folder


def script(folder: Path) -> Path:
    """A program that tells on whoever runs it."""
    path = folder.parent / "run.sh"
    path.write_text(f"#!/bin/sh\ntouch '{folder.parent / 'PWNED'}'\ncat 2>/dev/null\nexit 0\n")
    path.chmod(0o755)
    return path


def configure(*settings: str, attributes: str = "") -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        program = str(script(folder))
        for setting in settings:
            key, _, value = setting.partition("=")
            git(folder, "config", key, value.replace("PROGRAM", program))
        if attributes:
            (folder / ".gitattributes").write_text(attributes)

    return plant


def hooks(folder: Path) -> None:
    for name in ("post-index-change", "fsmonitor-watchman", "post-checkout"):
        (folder / ".git" / "hooks" / name).write_bytes(script(folder).read_bytes())
        (folder / ".git" / "hooks" / name).chmod(0o755)


def hooks_path(folder: Path) -> None:
    hooks(folder)
    (folder / ".git" / "hooks").rename(folder.parent / "hooks")
    git(folder, "config", "core.hooksPath", str(folder.parent / "hooks"))


def include(folder: Path) -> None:
    (folder / "more").write_text(f"[core]\n\tfsmonitor = {script(folder)}\n")
    git(folder, "config", "include.path", str(folder / "more"))


def submodule(folder: Path) -> None:
    other = folder.parent / "other"
    other.mkdir()
    git(other, "init")
    (other / "b.txt").write_text("b")
    git(other, "add", "b.txt")
    git(other, "commit", "-m", "b")
    git(folder, "submodule", "add", str(other), "sub")
    git(folder, "commit", "-m", "sub")
    git(folder / "sub", "config", "core.fsmonitor", str(script(folder)))
    git(folder, "config", "diff.submodule", "diff")
    (folder / "sub" / "b.txt").write_text("changed")


def partial_clone(folder: Path) -> None:
    configure("core.sshCommand=PROGRAM", "remote.origin.url=ssh://nowhere/x", "remote.origin.promisor=true")(folder)
    git(folder, "config", "core.repositoryFormatVersion", "1")
    git(folder, "config", "extensions.partialClone", "origin")
    blob = git(folder, "rev-parse", "HEAD:a.txt")
    (folder / ".git" / "objects" / blob[:2] / blob[2:]).unlink()


PLANTS: dict[str, Callable[[Path], None]] = {
    "fsmonitor": configure("core.fsmonitor=PROGRAM"),
    "fsmonitor, second protocol": configure("core.fsmonitor=PROGRAM", "core.fsmonitorHookVersion=2"),
    "hooks": hooks,
    "hooksPath": hooks_path,
    "clean filter": configure("filter.x.clean=PROGRAM", attributes="* filter=x\n"),
    "process filter": configure("filter.x.process=PROGRAM", "filter.x.required=true", attributes="* filter=x\n"),
    "smudge filter": configure("filter.x.smudge=PROGRAM", attributes="* filter=x\n"),
    "external diff": configure("diff.external=PROGRAM"),
    "diff command": configure("diff.x.command=PROGRAM", attributes="* diff=x\n"),
    "textconv": configure("diff.x.textconv=PROGRAM", attributes="* diff=x\n"),
    "pager": configure("core.pager=PROGRAM", "pager.diff=PROGRAM", "pager.status=PROGRAM"),
    "alias": configure("alias.state=!PROGRAM", "alias.rev-parse=!PROGRAM"),
    "ssh command": partial_clone,
    "include": include,
    "submodule": submodule,
    "signatures": configure("log.showSignature=true", "gpg.program=PROGRAM"),
    "others": configure("core.editor=PROGRAM", "core.askPass=PROGRAM", "credential.helper=!PROGRAM"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_no_program_of_the_repository_runs(repository, tmp_path, name):
    """Bug: training inside of a downloaded folder runs the command that its .git/config names."""
    PLANTS[name](repository)
    (tmp_path / "PWNED").unlink(missing_ok=True)  # planting with git may have run it
    state = git_state(repository)
    assert not (tmp_path / "PWNED").exists()
    assert state["sha"] is not None
    assert (state["branch"], state["dirty"]) == ("trunk", True)


@pytest.mark.parametrize("name", ["fsmonitor", "clean filter", "textconv", "external diff", "hooks", "submodule"])
def test_git_itself_would_run_it(repository, tmp_path, name):
    """Bug: the test above passes because its program is planted wrongly."""
    PLANTS[name](repository)
    (tmp_path / "PWNED").unlink(missing_ok=True)
    # whether status writes the index, which calls a hook, depends on the time since the file was changed
    for command in (["status"], ["diff"], ["update-index", "--force-write-index"]):
        subprocess.run(["git", *command], cwd=repository, check=False, capture_output=True)
    assert (tmp_path / "PWNED").exists()


def test_variables_of_git_have_no_effect(repository, tmp_path, monkeypatch):
    """Bug: a variable left over from a hook makes git read another repository, or run a program."""
    program = str(script(repository))
    expected = git_state(repository)
    for name in ("GIT_EXTERNAL_DIFF", "GIT_PAGER", "GIT_SSH_COMMAND", "GIT_TRACE2_EVENT"):
        monkeypatch.setenv(name, program)
    for name, value in {"COUNT": "1", "KEY_0": "core.fsmonitor", "VALUE_0": program}.items():
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert git_state(repository) == expected
    assert not (tmp_path / "PWNED").exists()


def test_nothing_is_written_into_the_repository(repository):
    """Bug: reading refreshes the index, which runs a hook and blocks the user's own commands."""
    os.utime(repository / "a.txt", (0, 0))
    before = {path: path.stat().st_mtime_ns for path in (repository / ".git").rglob("*")}
    git_state(repository)
    assert {path: path.stat().st_mtime_ns for path in (repository / ".git").rglob("*")} == before


def test_the_state_is_what_git_says(repository, tmp_path):
    """Bug: reading without the configuration gives another commit, branch, diff or list of files."""
    (repository / "new file").write_text("")
    (repository / "ü.txt").write_text("")
    (repository / ".git" / "info" / "exclude").write_text("*.log\n")
    (repository / "run.log").write_text("")
    git(repository, "pack-refs", "--all")
    state = git_state(repository)
    assert state["sha"] == git(repository, "rev-parse", "HEAD")
    assert state["diff"] == git(repository, "diff", "HEAD")
    assert state["untracked"] == ["new file", "ü.txt"]
    git(repository, "worktree", "add", str(tmp_path / "linked"), "-b", "side/line")
    linked = git_state(tmp_path / "linked")
    assert (linked["sha"], linked["branch"], linked["dirty"]) == (state["sha"], "side/line", False)
    git(repository, "checkout", "--detach")
    assert git_state(repository)["branch"] is None
    inside = repository / "folder"
    inside.mkdir()
    assert git_state(inside)["sha"] == state["sha"]


def test_the_users_own_ignore_file_counts(repository, tmp_path):
    """Bug: with a global ignore file every run is recorded as changed."""
    git(repository, "checkout", "a.txt")
    (repository / "x.swp").write_text("")
    assert git_state(repository)["dirty"] is True
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".gitconfig").write_text("[core]\n\texcludesFile = ~/ignore\n")
    (tmp_path / "home" / "ignore").write_text("*.swp\n")
    assert git_state(repository)["dirty"] is False


@pytest.mark.parametrize("name", ["HEAD", "config", "index", "packed-refs", "commondir", "info/exclude"])
@pytest.mark.parametrize("content", [b"", b"\0\xff" * 50, None], ids=["empty", "noise", "pipe"])
def test_damaged_repositories(repository, name, content):
    """Bug: a damaged repository, or a named pipe in it, ends or hangs the start of a run."""
    path = repository / ".git" / name
    path.unlink(missing_ok=True)
    if content is None and name != "index":  # git itself opens the index, and is ended after a while
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    assert git_state(repository).keys() == git_state(repository.parent).keys()


@pytest.mark.parametrize("content", ["gitdir: .git", "gitdir: nowhere", "gitdir: \0", "", "x" * 20_000])
def test_a_git_file_that_leads_nowhere(tmp_path, content):
    """Bug: a .git file that names itself or nothing gives an endless loop or a traceback."""
    (tmp_path / ".git").write_text(content)
    assert git_state(tmp_path)["sha"] is None


def test_creating_a_run_does_not_use_mlflows_reading_of_git(uri, monkeypatch):
    """Bug: MLflow asks GitPython for the commit, which runs git with the repository's configuration."""
    from mlflow.tracking.context import git_context

    from stabletrain.tracking.runs import create_run

    monkeypatch.setattr(git_context, "_resolve_git_info", lambda: pytest.fail("MLflow reads the repository"))
    assert create_run(uri, "demo")
