"""Recipes say little, compose, and reach what recipes/expected/ says they reached."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from stabletrain.core.metric_names import find

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
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
@pytest.mark.parametrize("recipe", RECIPES)
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
