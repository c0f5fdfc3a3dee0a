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
    (f"{RUN} seed=1,2", 2, ["seed=1,2", "add -m"]),
    (f"train {TINY}", 2, ["model._target_", "--trust tiny_workload", "data._target_"]),
    (f"{RUN} logger=mlflow logger.tracking_uri=sqlite:///corrupt.db", 2, ["corrupt.db", "damaged"]),
    (f"{RUN} logger=mlflow logger.tracking_uri=sqlite:////dev/null/x/m.db", 2, ["/dev/null/x"]),
    (f"{GPT} data.path=cut.txt.gz", 2, ["cut.txt.gz", "expected a whole gzip file"]),
    ("show clip_nrom", 2, ["'clip_nrom'", "did you mean 'clip_norm'"]),
    (f"{RUN} -m seed=range(3,1)", 2, ["seed=range(3,1)", "no values"]),
    ("cp nowhere new.yaml", 2, ["'nowhere'"]),
    ("replay clip_norm pipe.csv", 2, ["pipe.csv", "expected a CSV file"]),
    ("replay clip_norm negative.csv", 2, ["negative.csv, line 2", "grad_norm >= 0"]),
    ("report nowhere", 2, ["there is no tracking store", "mlflow.db", "MLFLOW_TRACKING_URI"]),
    ("ls plugin", 2, ["'plugin'", "did you mean 'plugins'"]),
    ("cp char_gpt mine.txt", 2, ["mine.txt", ".yaml"]),
    ("cp char_gpt /dev/null/x.yaml", 2, ["/dev/null/x.yaml"]),
    ("validate char_gpt recipe=digits_cn", 2, ["did you mean 'digits_cnn'"]),
]

# mistakes that one command may contain together: it reports all of them. (word of the command, words of its message)
TOGETHER = [
    ("optimzer=adamw", "optimzer: there is no such key; did you mean 'optimizer'?"),
    ("optimizer=adamw", None),
    ("optimizer.lrr=1", "optimizer.lrr: AdamW has no argument 'lrr'; did you mean 'lr'?"),
    ("optimizer.lr=fast", "optimizer.lr: expected float or Tensor, got 'fast'"),
    ("trainer.max_epocs=3", "trainer.max_epocs: Lightning's Trainer has no argument 'max_epocs'; did you mean 'max_ep"),
    ("plugins/spkie=none", "plugins/spkie: there is no config group 'plugins/spkie'; did you mean 'plugins/spike'?"),
    ("plugins/clip=nrom", "plugins/clip: there is no option 'nrom'; did you mean 'norm'?"),
    ("plugins/spike=null", "use plugins/spike=none"),
    ("plugins.nonfinite.max_in_a_row=3", "plugins.nonfinite: arguments are set (max_in_a_row), but no option is sele"),
    ("model._target_=os.system", "model._target_: 'os.system' may not be built"),
    ("data._target_=pip.main", "data._target_: 'pip.main' may not be built"),
    ("callbacks.x._target_=torch.os.system", "callbacks.x._target_: 'torch.os.system' may not be built"),
    ("run_dir=/dev/null/x", "run_dir: cannot write to /dev/null/x"),
    ("resume=nowhere.ckpt", "resume: there is no checkpoint at 'nowhere.ckpt'"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corrupt.db").write_text("this is no database, whatever its name says\n" * 20)
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
    """Bugs: the user learns of one mistake per attempt; a message without the key, or without the advice."""
    done = cli(*shlex.split(RUN), *(word for word, _ in TOGETHER))
    assert done.returncode == 2
    messages = [message for _, message in TOGETHER if message]
    assert f"error: {len(messages)} mistakes" in done.stderr
    for message in messages:
        assert message in done.stderr
    assert "Traceback" not in done.stderr


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
