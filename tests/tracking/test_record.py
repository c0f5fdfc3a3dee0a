import getpass
import json
import os
import platform
import subprocess

import pytest

from stabletrain.tracking import environment, git_state, write_environment


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-b", "trunk")
    (tmp_path / "a.txt").write_text("one\n")
    git("add", "a.txt")
    git("commit", "-m", "first")
    return tmp_path


def test_environment_holds_no_secrets(monkeypatch):
    """Bug: the record publishes a token, the user's name or the host's name."""
    monkeypatch.setenv("MY_API_TOKEN", "s3cr3t-value")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    record = environment()
    text = json.dumps(record)
    assert "s3cr3t-value" not in text
    assert os.path.expanduser("~") not in text
    assert record["variables"]["OMP_NUM_THREADS"] == "1"
    assert {"lightning", "torch", "mlflow"} <= set(record["packages"])
    assert record["torch"]["threads"] >= 1
    assert platform.node() not in json.dumps({**record, "packages": {}})
    assert getpass.getuser() not in json.dumps(record["platform"])


def test_settings_by_the_new_names_of_torch():
    """Bug: torch raises when a precision that was set by its new name is read by its old one, and no run starts."""
    import torch

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        settings = environment()["torch"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert settings["cuda_matmul_fp32_precision"] == "tf32"
    assert settings["float32_matmul_precision"] is None
    assert environment()["torch"]["float32_matmul_precision"] == "highest"


def test_clean_and_dirty(repository):
    """Bug: a run from changed code claims the commit's results."""
    clean = git_state(repository)
    assert len(clean["sha"]) == 40
    assert (clean["branch"], clean["dirty"], clean["diff"]) == ("trunk", False, "")
    (repository / "a.txt").write_text("two\n")
    (repository / "new file.txt").write_text("x")
    dirty = git_state(repository)
    assert dirty["dirty"] is True
    assert "+two" in dirty["diff"]
    assert len(dirty["untracked"]) == 1
    cut = git_state(repository, limit=10)
    assert (len(cut["diff"]), cut["diff_truncated"]) == (10, True)


def test_no_repository_and_no_commit(tmp_path):
    """Bug: code outside git, or before the first commit, cannot be trained."""
    assert git_state(tmp_path / "nowhere")["sha"] is None
    subprocess.run(["git", "init"], cwd=tmp_path, check=True, capture_output=True)
    state = git_state(tmp_path)
    assert (state["sha"], state["dirty"]) == (None, False)


def test_written_files(repository, tmp_path):
    """Bug: the diff is missing from the record, or hidden inside its JSON."""
    (repository / "a.txt").write_text("two\n")
    folder = tmp_path / "record"
    names = {path.name for path in write_environment(folder, code=repository)}
    assert names == {"environment.json", "requirements.txt", "git.json", "git.diff"}
    assert "+two" in (folder / "git.diff").read_text()
    assert "diff" not in json.loads((folder / "git.json").read_text())
    assert "torch==" in (folder / "requirements.txt").read_text()
