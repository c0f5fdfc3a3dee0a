from collections.abc import Callable
from pathlib import Path

import pytest

from stabletrain.config.compose import compose, expand
from stabletrain.config.problems import ConfigError
from stabletrain.config.validate import check

SLOTS = [
    *("resume", "clip", "nonfinite", "outliers", "spike", "accumulate"),
    *("optimizer", "noise", "averaging", "overfitting", "stopping"),
    *("noise_scale", "activations", "outputs", "qk", "gradients", "replicas", "checkpoints"),
]
TINY = str(Path(__file__).parents[1] / "launch" / "tiny.yaml")


def test_a_recipe_is_a_delta_on_train_yaml() -> None:
    """Bug: a default of train.yaml is lost, or Hydra's own groups are among the choices."""
    composed = compose(TINY)
    assert composed.recipe == "tiny"
    assert not composed.problems
    assert composed.config["recipe"] == "tiny"
    assert composed.config["trainer"]["max_steps"] == 5
    assert composed.config["trainer"]["devices"] == 1
    assert composed.config["optimizer"] is None
    assert composed.config["plugins"] == dict.fromkeys(SLOTS)
    assert composed.choices["plugins/clip"] == "none"
    assert not any(name.startswith("hydra") for name in composed.choices)


def test_an_option_and_its_arguments() -> None:
    """Bug: an argument is set before its option, which then overwrites it."""
    composed = compose(TINY, ["plugins/clip=norm", "plugins.clip.max_norm=0.25"])
    assert composed.config["plugins"]["clip"]["_target_"] == "stabletrain.ClipNorm"
    assert composed.config["plugins"]["clip"]["max_norm"] == 0.25


def test_what_refers_to_a_group_of_none_is_null() -> None:
    """Bug: the recipe's own arguments of an optimizer that is not selected are the optimizer of swap_optimizer."""
    composed = compose("char_gpt", ["optimizer=none", "plugins/optimizer=swap"])
    assert not composed.problems
    assert composed.config["plugins"]["optimizer"]["optimizer"] is None
    composed = compose(TINY, ["plugins/optimizer=swap"])
    assert composed.config["plugins"]["optimizer"]["optimizer"] is None


def test_slots_keep_their_order() -> None:
    # callbacks run in this order, and two runs of one config may not differ in it
    composed = compose(TINY, ["plugins/nonfinite=skip", "plugins/clip=norm"])
    assert list(composed.config["plugins"]) == SLOTS


def test_an_argument_that_no_file_lists_needs_no_plus() -> None:
    # Hydra's own advice, "use +optimizer.amsgrad", ends in a TypeError for a misspelt name
    composed = compose(TINY, ["optimizer=adamw", "optimizer.amsgrad=true", "trainer.max_time=00:01:00:00"])
    assert composed.config["optimizer"]["amsgrad"] is True
    assert composed.config["trainer"]["max_time"] == "00:01:00:00"


@pytest.mark.parametrize("override", ["plugins/clip=norm", "+plugins/clip=norm", "++plugins/clip=norm"])
def test_a_plus_before_a_group_makes_no_difference(override: str) -> None:
    # Hydra answers "Multiple values for plugins/clip" in the jargon of defaults lists
    assert compose(TINY, [override]).choices["plugins/clip"] == "norm"


def test_a_slot_of_a_third_party_needs_no_plus(install: Callable[..., Path]) -> None:
    """Bug: only our own slots can be selected without a plus."""
    install("cool_train", {"a/conf/plugins/mood/good.yaml": "_target_: cool_train.Mood\n"})
    assert compose(TINY, ["plugins/mood=good"]).config["plugins"]["mood"] == {"_target_": "cool_train.Mood"}


def test_a_slot_can_be_removed() -> None:
    """Bug: a removed slot keeps its default option."""
    assert compose(TINY, ["~plugins/clip"]).config["plugins"].get("clip") is None


@pytest.mark.parametrize("override", ["plugins/clip=none", "~plugins/clip"])
def test_none_on_the_command_line_drops_what_the_recipe_says_of_it(tmp_path: Path, override: str) -> None:
    # else no recipe that tunes a plugin could be ablated
    text = Path(TINY).read_text().replace("plugins/clip: none", "plugins/clip: norm")
    (tmp_path / "tuned.yaml").write_text(text + "plugins:\n  clip:\n    max_norm: 3.0\n")
    tuned = str(tmp_path / "tuned.yaml")
    assert compose(tuned).config["plugins"]["clip"]["max_norm"] == 3.0
    assert compose(tuned, [override]).config["plugins"].get("clip") is None
    node = compose(tuned, [override, "plugins.clip.max_norm=4"]).config["plugins"]["clip"]
    assert node == {"max_norm": 4}


def test_configs_beside_an_own_recipe_are_options(tmp_path: Path) -> None:
    """Bug: options in the folder of the user's recipe are not found."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: my.Model\n")
    (tmp_path / "run.yaml").write_text("defaults:\n  - train\n  - override model: mine\n  - _self_\n")
    found = compose(str(tmp_path / "run.yaml"), ["schedule=none", "plugins/gradients=none"])
    assert found.config["model"] == {"_target_": "my.Model"}


def test_a_folder_with_spaces_and_quotes(tmp_path: Path) -> None:
    """Bug: a path with special characters is read as Hydra's syntax."""
    folder = tmp_path / "it's a folder, is=n't it"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(Path(TINY).read_text())
    assert compose(str(folder / "tiny.yaml")).config["trainer"]["max_steps"] == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("plugins/clip=nrom", ["plugins/clip", "'nrom'", "did you mean 'norm'"]),
        ("plugins/spike=null", ["plugins/spike", "use plugins/spike=none"]),
        ("plugins/spiek=none", ["plugins/spiek", "did you mean 'plugins/spike'"]),
        ("precision=bf16-mixed", ["did you mean 'bf16_mixed'"]),
        ("precision=16", ["'16'", "choose one of: bf16_mixed"]),
        ("optimizer={lr: 3}", ["optimizer", "choose one of"]),
        ("seed=1,2", ["several values", "add -m"]),
        ("strategy=fsdp", ["strategy", "there is no option 'fsdp'", "use strategy=fsdp2"]),
        ("strategy=deepspeed_stage_2", ["in its own engine", "use strategy=fsdp2", "ddp_zero1"]),
        ("strategy=ddp_spawn", ["starts its processes", "strategy=ddp with launch.processes"]),
        ("strategy=ddp_notebook", ["starts its processes", "strategy='ddp_notebook'"]),
    ],
)
def test_a_wrong_choice_is_one_clear_problem(override: str, words: list[str]) -> None:
    """Bug: a misspelt choice in Hydra's words, without the near one."""
    (problem,) = compose(TINY, [override]).problems
    for word in words:
        assert word in str(problem)


def test_all_unknown_options_are_reported_at_once() -> None:
    """Bug: the user learns of one unknown option per attempt."""
    composed = compose(TINY, ["plugins/clip=nrom", "plugins.clip.max_norm=3", "precision=b", "plugins/spike=null"])
    assert [problem.key for problem in composed.problems] == ["plugins/clip", "precision", "plugins/spike"]


@pytest.mark.parametrize("text", ["a=[", "=3", "a.b", "a=}"])
def test_what_is_no_override_is_quoted(text: str) -> None:
    """Bug: a parser's error without the text that it is about."""
    with pytest.raises(ConfigError) as caught:
        compose(TINY, [text])
    assert caught.value.problems[0].key == text
    assert "expected key=value" in str(caught.value)


def test_an_unknown_recipe_has_a_near_one() -> None:
    """Bug: a misspelt recipe without a suggestion, or a missing file reported as a recipe."""
    with pytest.raises(ConfigError, match="did you mean 'char_gpt'"):
        compose("chargpt")
    with pytest.raises(ConfigError, match="there is no file"):
        compose("./chargpt.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defaults:\n  - train\n  - override plugins/clip: nrom\n", ["plugins/clip", "'nrom'", "did you mean 'norm'"]),
        ("defaults:\n  - trian\n", ["'trian'"]),
        ("defaults: [train\n", ["expected valid YAML"]),
        ("seed: ${no.such}\ndefaults:\n  - train\n", ["no.such"]),
        ("", ["nothing is selected"]),
    ],
)
def test_a_broken_recipe_is_a_message_that_names_the_file_or_key(tmp_path: Path, text: str, words: list[str]) -> None:
    """Bug: a traceback of OmegaConf's or of the YAML parser's."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    try:
        message = str(ConfigError(check(compose(str(file)))))
    except ConfigError as error:
        message = str(error)
    for word in words:
        assert word in message


def test_expand_without_sweep_is_one_job() -> None:
    """Bug: ``recipe=`` among the overrides is not the recipe."""
    assert expand(TINY, ["seed=3"], multirun=False) == [(TINY, ["seed=3"])]
    assert expand(None, ["recipe=char_gpt", "seed=3"], multirun=False) == [("char_gpt", ["seed=3"])]


def test_expand_multiplies_recipes_groups_and_values() -> None:
    """Bug: combinations are missing or come in another order."""
    jobs = expand(None, ["recipe=a,b", "plugins/clip=none,norm", "optimizer.lr=1e-3", "seed=range(0,2)"], multirun=True)
    assert len(jobs) == 8
    assert jobs[0] == ("a", ["plugins/clip=none", "optimizer.lr=1e-3", "seed=0"])
    assert jobs[-1] == ("b", ["plugins/clip=norm", "optimizer.lr=1e-3", "seed=1"])


def test_expand_knows_glob() -> None:
    """Bug: a pattern is taken for the name of an option."""
    found = [overrides for _, overrides in expand(TINY, ["plugins/clip=glob(no*)"], multirun=True)]
    assert ["plugins/clip=none"] in found
    assert ["plugins/clip=norm"] in found


def test_a_list_is_not_a_sweep() -> None:
    """Bug: a list as a value becomes several runs."""
    assert len(expand(TINY, ["optimizer.betas=[0.9,0.95]"], multirun=True)) == 1


def test_a_sweep_needs_the_flag() -> None:
    # two runs that the user did not ask for, or one with the text "1,2" as its seed
    with pytest.raises(ConfigError, match=r"seed=1,2: several values need several runs; add -m"):
        expand(TINY, ["seed=1,2"], multirun=False)


def test_a_missing_recipe_is_an_error_that_lists_them() -> None:
    """Bug: without a recipe an error from within Hydra."""
    with pytest.raises(ConfigError, match=r"recipe: none is named.*char_gpt"):
        expand(None, ["seed=1"], multirun=False)


def test_a_message_names_the_option_of_another_group_that_has_set_a_key() -> None:
    """Bug: ``+debug=two_processes`` sets the arguments of another model, and the message names keys nobody typed."""
    problems = {each.key: each.text for each in check(compose("digits_cnn", ["+debug=two_processes", "model.heads=2"]))}
    assert problems["model.layers"].endswith("(debug=two_processes sets it)")
    assert "two_processes" not in problems["model.heads"]
