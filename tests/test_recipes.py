"""Recipes say little, compose, and reach what recipes/expected/ says they reached."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from stabletrain.core.metric_names import find

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
FOR_GPUS = ("gpt_fsdp2_8gpu",)
"""Recipes that no test can run at full size."""
PROMISED = {"char_gpt": ("val/loss", "below", 1.85), "digits_cnn": ("val/accuracy", "above", 0.97)}


def expected_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("expected", ROOT / "benchmarks" / "expected.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_small_change_of_train(recipe: str) -> None:
    """Bug: a recipe that grows into a copy of train.yaml, or sets a group that is not there."""
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    assert len(text.splitlines()) <= 25
    assert "train" in yaml.safe_load(text)["defaults"]
    from stabletrain.config.compose import compose

    config = compose(recipe, []).config
    assert config["model"]["_target_"].startswith("stabletrain.workloads.")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [each for each in RECIPES if each not in FOR_GPUS])
def test_a_recipe_reaches_what_it_reached(recipe: str, tmp_path: Path) -> None:
    """Bug: a change that costs quality, or bits where the same bits are promised."""
    known = json.loads((ROOT / "recipes" / "expected" / f"{recipe}.json").read_text())
    script = expected_script()
    result = script.run(recipe, tmp_path / "run")
    metric, side, limit = PROMISED[recipe]
    assert result["metrics"][metric] < limit if side == "below" else result["metrics"][metric] > limit
    assert result["metrics"][script.SKIPPED] == known["metrics"][script.SKIPPED]
    if script.surroundings() == known["surroundings"] and result["threads"] == known["threads"]:
        for name, value in known["metrics"].items():
            present = find(name, result["metrics"])
            assert present is not None, name
            assert result["metrics"][present] == value, f"{name} differs on the same hardware, versions and threads"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FOR_GPUS)
def test_a_recipe_for_gpus_runs_scaled_down(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a recipe that nobody here can run at full size, and that does not run at all."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    command = ["-m", "stabletrain", "train", recipe, "+debug=two_processes", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "strategy.json").read_text())
    assert record["units"] == ["net.blocks.0", "net.blocks.1"]
    assert (record["processes"], record["strategy"]) == (2, "fsdp2")
    assert 0.5 < record["share_of_parameters"] < 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 20
