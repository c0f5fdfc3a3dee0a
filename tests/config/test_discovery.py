from collections.abc import Callable
from pathlib import Path

import pytest

from stabletrain.config import discovery
from stabletrain.config.discovery import DiscoveryError

COOL = {
    "clip_cool/__init__.py": "raise RuntimeError('discovery must not import plugins')",
    "clip_cool/rule.py": "",
    "clip_cool/README.md": "# clip_cool",
    "clip_cool/conf/plugins/clip/cool.yaml": "# Clips coolly.\n_target_: cool_train.Cool\n",
    "clip_cool/conf/plugins/mood/none.yaml": "# How do you feel?\n",
    "clip_cool/conf/plugins/mood/good.yaml": "_target_: cool_train.Mood\n",
    "no_plugin/__init__.py": "",
}


def test_a_third_partys_folder_is_a_plugin_and_is_not_imported(install: Callable[..., Path]) -> None:
    # a discovery that imports plugins is slow, and one broken plugin breaks every command
    install("cool_train", COOL, distribution="cool-train")
    plugin = discovery.plugins()["clip_cool"]
    assert plugin.kind == "rule"
    assert plugin.distribution == "cool-train"
    assert plugin.package == "cool_train.clip_cool"
    assert plugin.card is not None
    assert [(option.group, option.name) for option in plugin.options] == [
        ("plugins/clip", "cool"),
        ("plugins/mood", "good"),
        ("plugins/mood", "none"),
    ]
    assert "no_plugin" not in discovery.plugins()


def test_a_package_that_is_itself_a_plugin(install: Callable[..., Path]) -> None:
    """Bug: a distribution of one plugin needs a subfolder."""
    install("warm_train", {"conf/plugins/clip/warm.yaml": "_target_: warm_train.Warm\n", "callback.py": ""})
    assert discovery.plugins()["warm_train"].kind == "callback"


def test_a_third_party_can_add_a_slot(install: Callable[..., Path]) -> None:
    """Bug: only our own slots exist; or an option of a third party in our slot is not found."""
    install("cool_train", COOL)
    slot = discovery.slots()["mood"]
    assert slot.question == "How do you feel?"
    assert [option.name for option in slot.options] == ["none", "good"]
    assert "cool" in [option.name for option in discovery.slots()["clip"].options]


def test_two_files_for_one_option_are_an_error_that_names_both(install: Callable[..., Path]) -> None:
    # last-installed-wins would silently train with another plugin
    install("one_train", {"a/conf/plugins/clip/same.yaml": ""})
    install("two_train", {"b/conf/plugins/clip/same.yaml": ""})
    with pytest.raises(DiscoveryError, match=r"plugins/clip=same is both .*one_train.* and .*two_train"):
        discovery.plugins()


def test_a_plugin_cannot_replace_an_option_of_conf(install: Callable[..., Path]) -> None:
    """Bug: an installed package changes what ``optimizer=adamw`` means."""
    install("one_train", {"a/conf/optimizer/adamw.yaml": ""})
    with pytest.raises(DiscoveryError, match=r"optimizer=adamw is both"):
        discovery.plugins()


def test_two_plugins_of_one_name_are_an_error_that_names_both(install: Callable[..., Path]) -> None:
    """Bug: the plugin that was installed last replaces the other."""
    install("one_train", {"same/conf/plugins/clip/x.yaml": ""})
    install("two_train", {"same/conf/plugins/clip/y.yaml": ""})
    with pytest.raises(DiscoveryError, match=r"'same' is both .*one_train.* and .*two_train"):
        discovery.plugins()


def test_an_entry_point_without_its_package_is_named(install: Callable[..., Path]) -> None:
    # importlib's own error would be "spec is None" far from the cause
    site = install("lost_train", {})
    (site / "lost_train" / "__init__.py").unlink()
    (site / "lost_train").rmdir()
    discovery.clear_cache()
    with pytest.raises(DiscoveryError, match=r"'lost_train'.*reinstall or uninstall"):
        discovery.plugins()


def test_every_slot_of_ours_asks_a_question() -> None:
    """Bug: a slot without a question in its none.yaml, or without ``none`` as its first option."""
    for name, slot in discovery.slots().items():
        assert slot.question.endswith("?"), name
        assert slot.options[0].name == "none", name


def test_every_plugin_folder_of_ours_is_found() -> None:
    """Bug: a plugin folder that discovery does not recognise."""
    import stabletrain_plugins

    home = Path(stabletrain_plugins.__file__ or "").parent
    assert {path.parent.name for path in home.glob("*/conf")} <= set(discovery.plugins())


def test_recipes_are_short_and_have_a_summary() -> None:
    """Bug: a recipe without a summary, or one that repeats the defaults."""
    recipes = discovery.recipes()
    assert {"char_gpt", "digits_cnn"} <= set(recipes)
    for recipe in recipes.values():
        assert recipe.summary, recipe.name
        assert len(recipe.file.read_text(encoding="utf-8").splitlines()) <= 25, recipe.name
