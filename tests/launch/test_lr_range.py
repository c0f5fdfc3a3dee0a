"""``stabletrain lr-range`` through the command line."""

import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import LAUNCH

from stabletrain.config.compose import compose
from stabletrain.errors import UserError
from stabletrain.launch.launcher import LaunchRequest
from stabletrain.launch.lr_range import RangeOptions, prepare_range, range_config

TINY = str(LAUNCH / "tiny.yaml")


def test_what_stays_on_and_what_does_not() -> None:
    """Bugs: rollback goes back below the rates that were seen; a callback waits for a validation that is off; clipping
    is off, so that the rate is that without it; the bare run has clipping; the recipe's other parts change."""
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}"
    own = "+callbacks.own={_target_: lightning.pytorch.callbacks.LearningRateMonitor}"
    composed = compose("char_gpt", ["plugins/stopping=early", "plugins/noise=gaussian", stop, own])
    options = RangeOptions(start=1e-5, stop=0.1, steps=50)
    config, bare = (range_config(composed, options, bare=each) for each in (False, True))
    on = {slot for slot, node in config["plugins"].items() if node}
    assert {"clip", "nonfinite", "outliers", "noise", "gradients"} <= on
    assert not on & {"spike", "stopping", "checkpoints"}
    assert {slot for slot, node in bare["plugins"].items() if node} == on - {"clip", "nonfinite", "outliers"}
    assert list(config["callbacks"]) == ["own"]
    assert config["schedule"]["base"] == composed.config["optimizer"]["lr"] == 5e-3
    assert config["trainer"]["max_steps"] == 50
    for key in ("model", "data", "optimizer", "seed", "launch", "guard", "precision", "strategy", "logger"):
        assert config[key] == composed.config[key]
    assert composed.config["plugins"]["spike"], "the recipe's own config is unchanged"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"start": 0.0}, "--from: expected a learning rate above 0"),
        ({"stop": -1.0}, "--to: expected a learning rate above 0"),
        ({"stop": math.nan}, "--to: expected"),
        ({"start": math.inf}, "--from: expected"),
        ({"start": 1.0, "stop": 0.1}, "expected --from below --to"),
        ({"steps": 3}, "--steps: expected at least 20, got 3"),
    ],
)
def test_bad_options(given: dict[str, Any], expected: str) -> None:
    """Bug: the mistake is found by the worker, or by a logarithm."""
    with pytest.raises(UserError, match=expected):
        RangeOptions(**given)


def test_what_cannot_be_tested_so(tmp_path: Path) -> None:
    """Bugs: a test that begins with a checkpoint's position; one that reads a file that a batch job has not written."""
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as file:
        file.writestr("archive/data.pkl", b"")
    for words, expected in (
        ([f"resume={tmp_path}/a.ckpt"], "remove resume"),
        (["launch=slurm"], "launch=local"),
        (["dry_run=true"], "remove dry_run"),
        (["seed=1,2"], "give one value"),
    ):
        with pytest.raises(UserError, match=expected):
            prepare_range(LaunchRequest(recipe="digits_cnn", overrides=tuple(words)), RangeOptions())


@pytest.mark.slow
def test_both_runs_print_two_rates_and_draw(cli) -> None:
    """Bugs: a module's own optimizer cannot be tested; the runs overwrite each other; the recipe's length counts; the
    printed command cannot be run; a mistake is a traceback."""
    words = ("lr-range", TINY, "--trust", "tiny_workload", "model.size=16", "data.size=16")
    done = cli(*words, "--both", "--from", "1e-4", "--to", "100", "--steps", "60", "run_dir=r", "logger=mlflow")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steepest descent at") == 2
    assert done.stdout.count("a tenth of where it turns") == 2
    assert (cli.folder / "r" / "0" / "lr_range.png").stat().st_size > 5_000
    for number in "01":
        rows = (cli.folder / "r" / number / "lr_range.csv").read_text().splitlines()
        assert 20 < len(rows) < 61, "it has ended early"
        content = yaml.safe_load((cli.folder / "r" / number / "run.yaml").read_text())
        assert content["trainer"]["max_steps"] == 60
    names = {run.info.run_name for run in cli.runs()}
    assert names == {"lr-range with the default stack", "lr-range without the default stack"}
    assert f"next: stabletrain train {TINY}" in done.stdout
    assert "optimizer.lr" not in done.stdout, "the module's own optimizer has no such key"
    wrong = cli("lr-range", "digits_cnn", "--from", "1", "--to", "0.1")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: lr-range: expected --from below --to")
