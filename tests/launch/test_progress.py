"""The progress of a run on a terminal and in a file."""

import io
import re

import pytest
import rich
from fits import HEALTHY, Net, batches, fit
from lightning.pytorch import Callback

from stabletrain.launch.progress import RunBar, that_fit

LONG = "/a/path/" + "/".join(f"folder_{number}" for number in range(20)) + "/file.txt"


class Logged(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("a_metric_of_the_module_with_a_name_that_is_much_longer_than_others", loss, prog_bar=True)
        self.log("train_loss", loss, prog_bar=True)
        return loss


class Say(Callback):
    """Prints a path, as a message of a plugin does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print(f"written to {LONG}")


@pytest.mark.parametrize("width", [40, 60, 80, 130])
def test_the_bar_is_one_line(width, tmp_path):
    """Bugs: long names wrap the line, so that each refresh leaves a piece of it; a path is broken by a line's end."""
    out = io.StringIO()
    bar = RunBar(file=out, force_terminal=True, width=width, legacy_windows=False)
    try:
        fit(Logged(), batches(*[HEALTHY] * 3), bar, Say(), default_root_dir=tmp_path, enable_progress_bar=True)
    finally:
        rich.reconfigure()
    text = out.getvalue()
    assert "\x1b[1A" not in text, "a bar of several lines moves the cursor up"
    assert f"written to {LONG}" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n")
    lines = [line for line in plain.splitlines() if "it/s" in line]
    assert lines
    assert max(map(len, lines)) <= width
    assert width < 80 or "train_loss: " in plain


def test_the_metrics_that_fit():
    """Bug: one long name, or a negative room, hides all others or fails."""
    metrics = {"a_long_name_of_a_metric": 0.5, "lr": "0.1"}
    assert that_fit(metrics, 100) == {"a_long_name_of_a_metric": "0.500", "lr": "0.1"}
    assert that_fit(metrics, 8) == {"lr": "0.1"}
    assert that_fit({"a_long_name_of_a_metric": "0.5"}, 12) == {"…metric": "0.5"}
    assert that_fit(metrics, 3) == that_fit(metrics, -5) == that_fit({}, 50) == {}
