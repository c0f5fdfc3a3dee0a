"""``stabletrain new-plugin``: the names it refuses, and a distribution that works from build to training."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stabletrain.errors import UserError
from stabletrain.testing.template import create

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cool", "verb_noun"),
        ("Clip_Cool", "verb_noun"),
        ("clip-cool", "verb_noun"),
        ("clip cool", "verb_noun"),
        ("../clip_cool", "verb_noun"),
        ("1_clip", "verb_noun"),
        ("class_cool", "Python keyword"),
        ("clip_norm", "the plugin 'clip_norm' already exists"),
        ("stabletrain_plugins", "is the name of another package"),
        ("skip_outliers", "the plugin 'skip_outliers' already exists"),
    ],
)
def test_bad_names_are_refused(name: str, words: str, tmp_path: Path) -> None:
    """Bug: a plugin whose name is no identifier, or exists already; files left after a refusal."""
    with pytest.raises(UserError, match=words):
        create(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Bug: an existing folder is overwritten."""
    (tmp_path / "clip_cool").mkdir()
    with pytest.raises(UserError, match="already exists"):
        create("clip_cool", tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        create("clip_cool", tmp_path / "missing")


def test_slots_follow_from_the_name(tmp_path: Path) -> None:
    # catches a second none.yaml for a slot that exists, which discovery refuses as a clash
    found = {
        name: sorted(path.relative_to(tmp_path / name / name / "conf").as_posix() for path in made.rglob("*.yaml"))
        for name in ("clip_cool", "skip_cool", "watch_gradients")
        for made in [create(name, tmp_path)]
    }
    assert found == {
        "clip_cool": ["plugins/clip/cool.yaml"],
        "skip_cool": ["plugins/cool/none.yaml", "plugins/cool/skip.yaml"],
        "watch_gradients": ["plugins/gradients/watch.yaml"],
    }


@pytest.mark.slow
def test_a_new_distribution_builds_installs_lists_configures_and_runs(tmp_path: Path) -> None:
    # catches a template that misses a file in the wheel, is not found, not trusted, or does not train
    site = tmp_path / "site"
    run = Runner(tmp_path, site)
    home = Path(run("-m", "stabletrain", "new-plugin", "skip_cool", "--in", str(tmp_path)).strip())
    assert home == tmp_path / "skip_cool"
    run("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", str(site), str(home))
    assert "plugins/cool=skip" in run("-m", "stabletrain", "ls", "plugins")
    assert "SkipCool" in run("-m", "stabletrain", "show", "skip_cool")
    composed = run("-m", "stabletrain", "show", "digits_cnn", "plugins/cool=skip", "plugins.cool.factor=4")
    assert "_target_: skip_cool.SkipCool" in composed
    assert "factor: 4" in composed
    trained = (
        "from pathlib import Path; import stabletrain; from stabletrain.testing import toy;"
        "node = {'cool': {'_target_': 'skip_cool.SkipCool', 'factor': 4.0}};"
        "done = toy.fit(Path('.'), stabletrain.callbacks(node), faults={70: 1e4});"
        "print([each.step for each in done.outcomes if each.skipped])"
    )
    assert run("-c", trained).strip() == "[70]"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(home / "tests"))


@pytest.mark.slow
def test_the_wheel_has_the_template(tmp_path: Path) -> None:
    # catches template files that exist in the checkout only
    run = Runner(tmp_path, tmp_path / "site")
    run("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT))
    names = set(zipfile.ZipFile(next(tmp_path.glob("stabletrain-*.whl"))).namelist())
    wanted = {
        f"stabletrain/testing/template_files/{path.name}"
        for path in (ROOT / "stabletrain" / "testing" / "template_files").iterdir()
    }
    assert wanted
    assert wanted <= names


class Runner:
    """Runs this interpreter in a folder, with a site folder in front; returns what it printed."""

    def __init__(self, folder: Path, site: Path) -> None:
        self.folder, self.site = folder, site

    def __call__(self, *arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(self.site), "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
