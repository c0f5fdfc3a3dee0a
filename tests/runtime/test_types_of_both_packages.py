"""mypy accepts the public names with the Trainers of both packages of Lightning, and still finds wrong arguments."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """\
import lightning.pytorch
import pytorch_lightning as pl

import stabletrain as st

pl.Trainer(callbacks=st.default_callbacks())
pl.Trainer(callbacks=st.callbacks({"clip": None}))
pl.Trainer(callbacks=[st.ClipUnitwise(), st.MonitorGradients(), st.ResumeExactly(), pl.Callback()])
pl.Trainer(callbacks=st.Rollback())
lightning.pytorch.Trainer(callbacks=st.default_callbacks())
lightning.pytorch.Trainer(callbacks=st.callbacks({"clip": None}))
lightning.pytorch.Trainer(callbacks=[st.ClipUnitwise(), st.MonitorGradients(), lightning.pytorch.Callback()])
lightning.pytorch.Trainer(callbacks=st.Rollback())


class Module(pl.LightningModule):
    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        st.announce(self.trainer, "a second loss term")
        st.SaveCheckpoints().save(self.trainer)


st.ClipZScore(max_nrom=3.0)  # expect: call-arg
st.Rollback(evry=3)  # expect: call-arg
st.MonitorGradients(evry=3)  # expect: call-arg
st.ResumeExactly(evry=3)  # expect: call-arg
st.ClipValue(max=3)  # expect: call-arg
st.ScheduleLR(total=9, knd="cosine")  # expect: call-arg
st.SaveCheckpoints(every=object())  # expect: arg-type
st.Guard(mde="exact")  # expect: call-arg
st.announce("trainer", "a second loss term")  # expect: arg-type
"""


@pytest.mark.slow
def test_types_of_both_packages(tmp_path: Path) -> None:
    """Bugs: a script that mypy refuses for its ``pl.Trainer``; base classes so loose that no mistake is found."""
    (tmp_path / "script.py").write_text(SCRIPT)
    # where `make lint` leaves its cache, without which torch is read again
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--hide-error-context", "--no-pretty"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(tmp_path / "script.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    expected = [
        f"script.py:{number} [{line.split('# expect: ')[1]}]"
        for number, line in enumerate(SCRIPT.splitlines(), 1)
        if "# expect: " in line
    ]
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    found = [f"{Path(line.partition(': error:')[0]).name} [{line.rpartition('[')[2]}" for line in errors]
    assert found == expected, done.stdout + done.stderr
