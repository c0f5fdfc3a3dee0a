"""The code of a run by content."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from stabletrain.tracking.code_files import code_record, named_packages, package_paths
from stabletrain.tracking.git_record import git_record, write_git
from stabletrain.tracking.runs import git_tags


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package and a module, neither of them installed, with what is no code of theirs beside it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (
        "pkg/__init__.py",
        "pkg/sub/net.py",
        "pkg/.hidden/a.py",
        "pkg/node_modules/b.py",
        "lone.py",
        "side.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "pkg/venv").mkdir()
    (tmp_path / "pkg/venv/pyvenv.cfg").write_text("")
    (tmp_path / "pkg/venv/c.py").write_text("")
    (tmp_path / "pkg/data.bin").write_bytes(b"0")
    (tmp_path / "pkg/loop").symlink_to(tmp_path / "pkg")
    yield tmp_path
    for name in ("pkg", "lone", "side"):
        sys.modules.pop(name, None)


def test_which_packages_a_config_names() -> None:
    """Bugs: targets in lists are missed; Python's own modules are hashed; a text that is no target is taken for one."""
    config = {
        "model": {"_target_": "mine.net.Net"},
        "callbacks": {"a": {"_target_": "other.Stop", "inner": [{"_target_": "third.X"}]}},
        "limit": {"_target_": "datetime.timedelta"},
        "strange": {"_target_": 3},
        "optimizer": {"_target_": "torch.optim.AdamW"},
    }
    assert named_packages(config) == [
        "lightning", "mine", "other", "stabletrain", "stabletrain_plugins", "third", "torch",
    ]  # fmt: skip


def test_code_by_content(user_folder: Path) -> None:
    """Bugs: a changed line that no record shows; torch hashed file by file; an environment or a link within the package
    that is hashed too; a package that is imported to be recorded; a missing one that ends the record."""
    packages = ["lone", "pkg", "torch", "stabletrain", "missing", "sys"]
    before = code_record(packages, loaded=False)
    assert set(before) == {"lone", "pkg", "torch", "stabletrain"}
    digest = hashlib.sha256(b"# pkg/sub/net.py\n").hexdigest()
    assert before["pkg"]["files"].keys() == {"__init__.py", "sub/net.py"}
    assert before["pkg"]["files"]["sub/net.py"] == digest
    assert before["lone"]["files"].keys() == {"lone.py"}
    assert before["torch"].keys() == {"version"}
    assert {"__init__.py", "tracking/code_files.py"} <= before["stabletrain"]["files"].keys()
    assert "pkg" not in sys.modules
    (user_folder / "pkg/sub/net.py").write_text("# another line\n")
    after = code_record(packages, loaded=False)
    changed = {(name, file) for name in after for file, value in after[name].get("files", {}).items()
               if value != before[name]["files"][file]}  # fmt: skip
    assert changed == {("pkg", "sub/net.py")}


def test_the_users_own_modules_that_are_loaded(user_folder: Path) -> None:
    """Bugs: a module beside the named one, which it imports, is in no record; installed packages are hashed."""
    import pkg.sub.net  # noqa: F401
    import side  # noqa: F401

    found = code_record(["lone"])
    assert found["pkg"]["files"].keys() == {"__init__.py", "sub/net.py"}
    assert found["side"]["files"].keys() == {"side.py"}
    assert not {"torch", "numpy", "pytest", "json"} & set(found)
    assert package_paths("side") == [user_folder / "side.py"]


def test_git_of_every_repository_that_holds_a_package(user_folder: Path, tmp_path: Path) -> None:
    """Bugs: only the current folder's commit is recorded; an environment in a repository counts as its code; two
    repositories' diffs in one file; a cut diff, or a cut list of untracked files, that looks whole."""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=user_folder, check=True, capture_output=True)

    git("init", "-b", "trunk")
    git("add", "pkg/__init__.py", "pkg/sub/net.py")
    git("commit", "-m", "first")
    (user_folder / "pkg/__init__.py").write_text("# changed\n")
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    record = git_record(elsewhere, ["pkg", "lone", "torch", "pytest"])
    (found,) = record["repositories"]
    assert record["sha"] is None
    assert found["packages"] == ["pkg", "lone"]
    assert (len(found["sha"]), found["branch"], found["dirty"]) == (40, "trunk", True)
    assert "lone.py" in found["untracked"]
    assert (found["diff_truncated"], found["untracked_truncated"]) == (False, False)
    tags = git_tags({**record, "repositories": [{**found, "packages": ["stabletrain"], "sha": "1" * 40}, found]})
    assert (tags["git.sha"], tags["git.dirty"]) == (found["sha"], "true")
    names = {path.name for path in write_git(tmp_path / "record", record)}
    assert names == {"git.json", "git-pkg.diff"}
    assert "+# changed" in (tmp_path / "record/git-pkg.diff").read_text()
    assert git_record(tmp_path / "gone", ["pkg"])["repositories"][0]["sha"] == found["sha"]
    own = git_record(user_folder, ["pkg"])
    assert own["repositories"][0]["sha"] == own["sha"]
    assert {path.name for path in write_git(tmp_path / "own", own)} == {"git.json", "git.diff"}
    for number in range(1001):
        (user_folder / f"new{number}.py").touch()
    many = git_record(user_folder)
    assert (len(many["untracked"]), many["untracked_truncated"]) == (1000, True)
