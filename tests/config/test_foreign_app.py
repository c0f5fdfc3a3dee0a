"""Hydra apps of other people get the groups of the plugins, and no others of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stabletrain.config.discovery import searchpath

APP = """
import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="mine")
def main(cfg: DictConfig) -> None:
    import stabletrain

    print("CONFIG", sorted(cfg))
    print("CALLBACKS", [type(callback).__name__ for callback in stabletrain.callbacks(cfg.get("plugins"))])


main()
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "conf" / "trainer").mkdir(parents=True)
    (tmp_path / "conf" / "mine.yaml").write_text("defaults:\n  - trainer: own\n  - _self_\nlr: 1\n")
    (tmp_path / "conf" / "trainer" / "own.yaml").write_text("epochs: 3\n")
    (tmp_path / "app.py").write_text(APP)
    return tmp_path / "app.py"


def run(app: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(app), *overrides],
        cwd=app.parent,
        env={**os.environ, "HYDRA_FULL_ERROR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_plugins_are_chosen_and_built(app: Path) -> None:
    """Bug: our groups are not found in another app, or need a second step."""
    done = run(app, "+plugins/clip=norm", "+plugins/nonfinite=skip", "+plugins/spike=none", "plugins.clip.max_norm=3")
    assert "CONFIG ['lr', 'plugins', 'trainer']" in done.stdout, done.stderr
    assert "CALLBACKS ['ClipNorm', 'SkipNonFinite']" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["a b", "a%20b", "é"])
def test_a_folder_with_any_name_is_on_the_search_path(name: str, tmp_path: Path) -> None:
    """Bug: Hydra does not decode a URI, so that plugins below a folder ``a b`` are not found."""
    from hydra import compose, initialize_config_dir

    (tmp_path / name / "clip").mkdir(parents=True)
    (tmp_path / name / "clip" / "own.yaml").write_text("x: 1\n")
    (tmp_path / "main.yaml").write_text("{}\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        found = compose("main", ["+clip=own", f"hydra.searchpath=['{searchpath(tmp_path / name)}']"])
    assert found == {"clip": {"x": 1}}


def test_nothing_else_of_ours_is_on_the_search_path(app: Path) -> None:
    # our trainer, model and logger groups would mix with the app's own
    help_text = run(app, "--help").stdout
    groups = {line.split(":")[0] for line in help_text.splitlines() if ": " in line and not line.startswith("lr")}
    assert {"trainer", "plugins/clip", "plugins/spike"} <= groups
    assert "trainer: own" in help_text
    assert not {"model", "data", "logger", "launch"} & groups


def test_an_app_without_plugins_gets_no_callbacks(app: Path) -> None:
    """Bug: an app that selects nothing fails, or gets a default stack."""
    done = run(app)
    assert "CALLBACKS []" in done.stdout, done.stderr


def test_a_config_cannot_run_any_function(app: Path) -> None:
    """Bug: the check of trust is only in our own command line."""
    done = run(app, "+plugins.clip._target_=os.system", "+plugins.clip.command=false")
    assert "'os.system' may not be built from a config" in done.stderr
    done = run(app, "+plugins/clip=norm", "+plugins.clip.name={_target_:torch.PyTorchFileWriter,_args_:[PWNED]}")
    assert "plugins.clip.name: expected str or None, got a node" in done.stderr
    assert not list(app.parent.rglob("PWNED"))


def test_a_config_is_not_resolved_a_second_time(app: Path) -> None:
    """Bug: an escaped interpolation is text for the check, and is resolved when the object is built."""
    done = run(
        app, "+plugins/clip=norm", r"plugins.clip.name='\${oc.create:{_target_:psutil.Popen,args:[touch,PWNED]}}'"
    )
    assert "plugins.clip.name: expected a resolved value" in done.stderr
    assert not list(app.parent.rglob("PWNED"))
