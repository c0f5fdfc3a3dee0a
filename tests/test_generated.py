"""The export table and the catalogues say what the folders say."""

import shutil
from pathlib import Path

import generate
import pytest

from stabletrain.config import discovery
from stabletrain.config.discovery import PluginInfo
from stabletrain.errors import UserError


def test_generated_files_are_current() -> None:
    # catches a plugin that was added, renamed or removed without `make generate`
    outdated = [str(path.relative_to(generate.ROOT)) for path in generate.outdated()]
    assert not outdated, f"run `make generate`: {outdated}"


def test_writing_twice_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # catches a generator that eats or repeats lines around its block
    for file in ("pyproject.toml", "stabletrain/__init__.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(generate.ROOT / file, tmp_path / file)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    generate.main([])
    assert generate.outdated() == []
    assert generate.main(["--check"]) == 0
    (tmp_path / "plugins" / "README.md").write_text("old")
    assert generate.main(["--check"]) == 1
    assert (tmp_path / "plugins" / "README.md").read_text() == "old"


def test_every_recipe_is_in_the_recipes_page() -> None:
    # catches a recipe that was added without a line in recipes/README.md
    page = (generate.ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert [name for name in discovery.recipes() if f"({name}.yaml)" not in page] == []


def test_a_public_name_without_a_class_is_refused(tmp_path: Path) -> None:
    # catches a typo in `_target_` that would become an export of nothing
    (tmp_path / "conf" / "plugins" / "clip").mkdir(parents=True)
    (tmp_path / "conf" / "plugins" / "clip" / "odd.yaml").write_text("_target_: stabletrain.ClipOdd\n")
    (tmp_path / "rule.py").write_text("class ClipOddityRule: ...\n")
    options = tuple(discovery.options_in(tmp_path / "conf"))
    plugin = PluginInfo(name="clip_odd", package="p", folder=tmp_path, distribution="d", kind="rule", options=options)
    with pytest.raises(UserError, match=r"'clip_odd'.*ClipOddRule"):
        generate.exports([plugin])
