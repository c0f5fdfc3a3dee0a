"""Bad input through the real command line: one message that names the key and what to do, no traceback."""

import gzip
import os
import shlex
import sqlite3
from pathlib import Path

import pytest

TINY = Path(__file__).parents[1] / "launch" / "tiny.yaml"
RUN = f"train {TINY} --trust tiny_workload"
GPT = "train char_gpt logger=none model.layers=1"

# (command, exit code, words that the message must contain)
TABLE = [
    ("train", 2, ["recipe: none is named", "char_gpt"]),
    ("train char_gtp", 2, ["recipe", "'char_gtp'", "did you mean 'char_gpt'"]),
    ("train ./nowhere.yaml", 2, ["nowhere.yaml", "stabletrain cp"]),
    ("trian char_gpt", 2, ["trian"]),
    (f"{RUN} a=[", 2, ["a=[", "expected key=value"]),
    (f"{RUN} optimzer=adamw", 2, ["optimzer", "did you mean 'optimizer'"]),
    (f"{RUN} optimizer=adamw optimizer.lrr=1", 2, ["optimizer.lrr", "did you mean 'lr'"]),
    (f"{RUN} optimizer=adamw optimizer.lr=fast", 2, ["optimizer.lr", "expected float", "'fast'"]),
    (f"{RUN} trainer.max_epocs=3", 2, ["trainer.max_epocs", "did you mean 'max_epochs'"]),
    (f"{RUN} plugins/spkie=none", 2, ["plugins/spkie", "did you mean 'plugins/spike'"]),
    (f"{RUN} plugins/clip=nrom", 2, ["plugins/clip", "'nrom'", "did you mean 'norm'"]),
    (f"{RUN} plugins/spike=null", 2, ["use plugins/spike=none"]),
    (f"{RUN} plugins.spike.window=3", 2, ["plugins.spike", "no option is selected"]),
    (f"{RUN} seed=1,2", 2, ["seed=1,2", "add -m"]),
    (f"{RUN} model._target_=os.system", 2, ["model._target_", "'os.system' may not be built"]),
    (f"{RUN} data._target_=pip.main", 2, ["data._target_", "'pip.main' may not be built"]),
    (f"{RUN} callbacks.x._target_=torch.os.system", 2, ["callbacks.x._target_", "not trusted"]),
    (f"train {TINY}", 2, ["model._target_", "--trust tiny_workload", "data._target_"]),
    (f"{RUN} run_dir=/dev/null/x", 2, ["run_dir", "/dev/null/x", "run_dir=FOLDER"]),
    (f"{RUN} resume=nowhere.ckpt", 2, ["resume", "'nowhere.ckpt'"]),
    (f"{RUN} logger=mlflow logger.tracking_uri=sqlite:///corrupt.db", 2, ["corrupt.db", "damaged"]),
    (f"{RUN} logger=mlflow logger.tracking_uri=sqlite:////dev/null/x/m.db", 2, ["/dev/null/x"]),
    (f"{GPT} data.path=nowhere.txt", 2, ["nowhere.txt"]),
    (f"{GPT} data.path=empty.txt", 2, ["empty.txt"]),
    (f"{GPT} data.path=cut.txt.gz", 2, ["cut.txt.gz"]),
    ("show clip_nrom", 2, ["'clip_nrom'", "did you mean 'clip_norm'"]),
    (f"{RUN} -m seed=range(3,1)", 2, ["seed=range(3,1)", "no values"]),
    ("cp nowhere new.yaml", 2, ["'nowhere'"]),
    ("replay clip_norm pipe.csv", 2, ["pipe.csv", "expected a CSV file"]),
    ("replay clip_norm negative.csv", 2, ["negative.csv, line 2", "grad_norm >= 0"]),
    ("ls plugin", 2, ["'plugin'", "did you mean 'plugins'"]),
    ("cp char_gpt mine.txt", 2, ["mine.txt", ".yaml"]),
    ("cp char_gpt /dev/null/x.yaml", 2, ["/dev/null/x.yaml"]),
    ("validate char_gpt recipe=digits_cn", 2, ["did you mean 'digits_cnn'"]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corrupt.db").write_text("this is no database, whatever its name says\n" * 20)
    (tmp_path / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "negative.csv").write_text("loss,grad_norm\n1,-1\n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"to be or not to be " * 1000)[:-30])
    return tmp_path


@pytest.mark.parametrize(("command", "code", "words"), TABLE, ids=[row[0].replace(str(TINY), "tiny") for row in TABLE])
def test_bad_input(cli, folder: Path, command: str, code: int, words: list[str]) -> None:
    """Bug: a traceback, another exit code, or a message without the key or the advice."""
    done = cli(*shlex.split(command))
    assert done.returncode == code, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_all_mistakes_at_once(cli) -> None:
    """Bug: the user learns of one mistake per attempt."""
    words = ["optimizer.lr=fast", "trainer.max_epocs=3", "plugins/clip=nrom", "sede=3"]
    done = cli("validate", str(TINY), "--trust", "tiny_workload", "optimizer=adamw", *words)
    assert done.returncode == 2
    assert "error: 4 mistakes" in done.stderr


def test_a_run_that_cannot_start_leaves_no_folder(cli, folder: Path) -> None:
    # a folder for each refused attempt buries the real ones
    cli(*shlex.split(f"{RUN} logger=mlflow logger.tracking_uri=sqlite:///corrupt.db"))
    assert not (folder / "runs").exists() or not any((folder / "runs" / "tiny").iterdir())


@pytest.mark.slow
def test_a_locked_database(cli, folder: Path) -> None:
    """Bug: a locked database hangs the start, or ends in a traceback."""
    holder = sqlite3.connect(folder / "mlflow.db", isolation_level=None)
    holder.execute("CREATE TABLE t (x)")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        done = cli(*shlex.split(f"{RUN} logger=mlflow"))
    finally:
        holder.close()
    assert done.returncode == 2
    assert "mlflow.db" in done.stderr
    assert "locked" in done.stderr
    assert "Traceback" not in done.stderr
