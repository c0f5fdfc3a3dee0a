"""Recipe files that somebody else may have sent."""

import os
from pathlib import Path

import pytest

from stabletrain.config.compose import compose, expand
from stabletrain.config.problems import ConfigError
from stabletrain.config.sweep import MOST_JOBS
from stabletrain.config.validate import check

BASE = "defaults: [train, {override model: digits_cnn}, {override data: digits}, {override logger: none}, _self_]\n"


def message(file: Path, *overrides: str) -> str:
    try:
        return "\n".join(map(str, check(compose(str(file), overrides))))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BASE + "run_dir: ${oc.env:HOME}", ["run_dir", "environment variables"]),
        (BASE + "run_dir: '\\${oc.env:HOME}'", ["run_dir", "environment variables"]),
        (BASE + "run_dir: '\\\\${seed}'", ["run_dir"]),
        (BASE + "run_dir: ${a.${oc.env:X}}", ["run_dir"]),
        (BASE + "run_dir: ${now:%Y}", ["run_dir"]),
        (BASE + "run_dir: ['${oc.create:{a: 1}}']", ["run_dir[0]"]),
        (BASE + "callbacks: {'${seed}': {}}", ["callbacks", "plain key"]),
        (BASE + "run_dir: '$${recipe}'\nresume: ${no.such}", ["resume", "no.such"]),
        ("defaults: [train, {model: '${oc.env:HOME}'}]", ["defaults[1].model"]),
        ("# @package ${oc.env:HOME}\n" + BASE, ["line 1", "@package"]),
        ("# @package hydra\n" + BASE, ["line 1", "@package"]),
        (BASE + "hydra: {searchpath: ['pkg://os']}", ["hydra"]),
        ("defaults: [train, {override hydra/launcher: basic}, _self_]", ["defaults[1]", "hydra/launcher"]),
        ("defaults: [train, {'model@hydra.job': digits_cnn}]", ["defaults[1]"]),
        ("defaults: [../../../etc/x]", ["defaults[0]", "../../../etc/x"]),
        ("defaults: [train, {override model: ../../x}]", ["defaults[1]", "../../x"]),
        ("defaults: [//etc/x]", ["defaults[0]"]),
        ("defaults: ['pkg://os']", ["defaults[0]"]),
        ("defaults: 1", ["defaults: expected a list", "got 1"]),
        ("defaults: null", ["defaults: expected a list", "got nothing"]),
        ("defaults: train", ["got 'train'"]),
        ("defaults: {train: 1}", ["defaults: expected a list"]),
        ("defaults: [[train]]", ["defaults[0]"]),
        ("defaults: [train, 1]", ["defaults[1]", "got 1"]),
        ("defaults: [null]", ["defaults[0]"]),
        ("defaults: [{model: 3}]", ["defaults[0]"]),
        ("defaults: [{a: b, c: d}]", ["defaults[0]"]),
        ("defaults: [train, mine]", ["select each other: mine.yaml -> mine.yaml"]),
        (BASE + "run_dir: ${resume}\nresume: ${run_dir}", ["circle", "run_dir -> resume -> run_dir"]),
        (BASE + "trainer: {x: '${trainer}'}", ["trainer.x", "circle"]),
        (BASE + "a0: x\n" + "".join(f"a{i + 1}: '{f'${{a{i}}}' * 10}'\n" for i in range(20)), ["at most 1000000"]),
        (BASE + "plugins: {clip: 0}", ["plugins.clip: expected _target_", "got 0", "plugins/clip=OPTION"]),
        (BASE + "plugins: 0", ["plugins: expected dict, got 0"]),
        (BASE + "callbacks: ''", ["callbacks: expected dict, got ''"]),
        (BASE + "optimizer: 0", ["optimizer: expected _target_", "got 0"]),
        (BASE + "optimizer: []", ["optimizer: expected keys"]),
        (BASE + 'run_dir: "\\ud800"', ["run_dir", "UTF-8"]),
        (BASE + "seed: 99999999999999999999", ["seed", "64 bits"]),
    ],
    ids=lambda value: str(value).removeprefix(BASE)[:40],
)
def test_a_recipe_that_is_refused(tmp_path: Path, content: str, words: list[str]) -> None:
    """Bugs: a file that reads the environment, other files or imports; a traceback; a false value that means none."""
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    for word in words:
        assert word in message(file)


@pytest.mark.parametrize("name", ["train", "a=b, 'c' \"d\" é", "-x", "_recipe_", "plugins"])
def test_any_name_of_a_file(tmp_path: Path, name: str) -> None:
    """Bugs: a recipe called train.yaml hides the base of all recipes; a name is read as Hydra's syntax."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / f"{name}.yaml").write_text(BASE + "trainer: {max_steps: '${..seed}'}\nseed: 5\n")
    assert message(tmp_path / f"{name}.yaml") == ""


@pytest.mark.parametrize("name", [".hidden", ".", "${oc.env:HOME}", "a\nb"])
def test_a_name_that_is_refused(tmp_path: Path, name: str) -> None:
    """Bug: the name of a file is resolved, or becomes a folder above that of the runs."""
    (tmp_path / f"{name}.yaml").write_text(BASE)
    assert "expected a file with a plain name" in message(tmp_path / f"{name}.yaml")


def test_configs_beside_a_recipe_are_checked_too(tmp_path: Path) -> None:
    """Bugs: an option beside a recipe may do what the recipe may not; a link or a pipe among them."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "env.yaml").write_text("_target_: ${oc.env:HOME}\n")
    (tmp_path / "model" / "link.yaml").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "model" / "pipe.yaml")
    (tmp_path / "mine.yaml").write_text(BASE)
    for option, word in (("env", "_target_"), ("link", "copy it there"), ("pipe", "a named pipe")):
        assert word in message(tmp_path / "mine.yaml", f"model={option}")


def test_circles_and_explosions_of_defaults_lists(tmp_path: Path) -> None:
    """Bugs: a RecursionError; 2 to the power of 30 files."""
    (tmp_path / "a.yaml").write_text("defaults: [b]")
    (tmp_path / "b.yaml").write_text("defaults: [a]")
    assert "b.yaml -> a.yaml -> b.yaml" in message(tmp_path / "a.yaml")
    for i in range(30):
        (tmp_path / f"f{i}.yaml").write_text(f"defaults: [f{i + 1}, f{i + 1}]")
    assert "at most 1000 configs" in message(tmp_path / "f0.yaml")


def test_what_the_user_types_may_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: an interpolation on the command line is refused; one that is escaped there is resolved later."""
    monkeypatch.setenv("STABLETRAIN_TEST", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(BASE)
    found = compose(str(tmp_path / "mine.yaml"), ["run_dir='${oc.env:STABLETRAIN_TEST}'"])
    assert found.config["run_dir"] == str(tmp_path)
    assert "after everything was resolved" in message(tmp_path / "mine.yaml", "run_dir='\\${oc.env:STABLETRAIN_TEST}'")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["seed=range(3,1)"], "no values"),
        (["seed=range(1,10,0)"], "must not be zero"),
        (["seed=range(0,1,nan)"], "got none"),
        (["seed=range(0,100000000)"], f"at most {MOST_JOBS} values"),
        (["seed=shuffle(range(0,100000000))"], f"at most {MOST_JOBS} values"),
        (["seed=range(0,100)", "a=range(0,100)"], f"at most {MOST_JOBS} runs in all, got 10000"),
        (["plugins/clip=glob(zz*)"], "no values"),
        (["~recipe"], "a run needs one"),
        (["recipe="], "none is named"),
        (["a=" + "[" * 2000], "nested brackets"),
        (["a=" + "x" * 20_000], "characters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_sweep_that_is_refused(words: list[str], text: str) -> None:
    """Bugs: no job, no word and exit code 0; millions of jobs; a traceback."""
    with pytest.raises(ConfigError, match=text):
        expand(None if "recipe" in words[0] else "char_gpt", words, multirun=True)


def test_hundreds_of_mistakes_are_counted(tmp_path: Path) -> None:
    """Bug: a screen full of mistakes, of which the first is the one that matters."""
    (tmp_path / "mine.yaml").write_text(BASE + "".join(f"key{i}: {i}\n" for i in range(300)))
    lines = str(ConfigError(check(compose(str(tmp_path / "mine.yaml"))))).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 280 more"
