import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HEAVY = ("torch", "lightning", "mlflow", "hydra", "numpy")


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["ls"], ["ls", "plugins"], ["train", "--help"], ["show", "clip_norm"]]
)
def test_help_ls_and_show_import_nothing_heavy(words: list[str]) -> None:
    # lightning alone takes four seconds
    code = (
        "import sys; sys.argv[1:] = " + repr(words) + "\n"
        "from stabletrain.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_completion_of_recipes_and_groups_imports_nothing_heavy() -> None:
    """Bug: each press of the tab key waits for torch; or choices after a comma are not completed."""
    code = (
        "import sys\n"
        "from stabletrain.cli.completion import complete\n"
        "assert complete([], 'char') == ['char_gpt']\n"
        "assert complete(['char_gpt'], 'plugins/cl') == ['plugins/clip=']\n"
        "assert 'plugins/clip=none,norm' in complete(['char_gpt'], 'plugins/clip=none,no')\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_completion_of_keys() -> None:
    """Bug: keys of groups that are not selected are offered, or none."""
    from stabletrain.cli.completion import complete

    found = complete(["digits_cnn", "schedule=none"], "optimizer.l")
    assert found == ["optimizer.lr="]


def test_the_shell_asks_the_program_for_completions() -> None:
    """Bug: the entry point does not answer the shell's request."""
    script = Path(sys.executable).with_name("stabletrain")
    asked = {"_STABLETRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "stabletrain train char", "COMP_CWORD": "2"}
    done = subprocess.run([script], env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["char_gpt"]


def test_ls_lists_everything(cli) -> None:
    """Bug: a kind of item is not listed."""
    out = cli("ls").stdout
    for word in ("char_gpt", "digits_cnn", "clip_norm", "plugins/clip=norm", "How large may the gradient be"):
        assert word in out


def test_show_a_plugin(cli) -> None:
    """Bug: a plugin is found only by one of its names, or shown without its arguments."""
    out = cli("show", "clip_norm").stdout
    for word in ("clip_norm: a rule of stabletrain", "plugins/clip=norm", "max_norm", "Arguments"):
        assert word in out
    assert cli("show", "norm").stdout == out


def test_show_a_slot_and_a_group(cli) -> None:
    """Bug: the options of a slot or group cannot be shown."""
    assert "How large may the gradient be" in cli("show", "clip").stdout
    assert "bf16_mixed" in cli("show", "precision").stdout


def test_show_a_recipe_is_its_composed_config(cli) -> None:
    """Bug: overrides are ignored, or the output is not YAML."""
    done = cli("show", "digits_cnn", "trainer.max_epochs=3")
    assert done.returncode == 0, done.stderr
    content = yaml.safe_load(done.stdout)
    assert content["trainer"]["max_epochs"] == 3
    assert content["model"]["_target_"] == "stabletrain.workloads.DigitsCNN"


def test_cp_makes_a_recipe_that_runs(cli) -> None:
    """Bug: an existing file is overwritten; or the copy has paths that are wrong in its new folder."""
    assert cli("cp", "digits_cnn", "mine.yaml").returncode == 0
    again = cli("cp", "digits_cnn", "mine.yaml")
    assert again.returncode == 2
    assert "already exists" in again.stderr
    assert "DigitsCNN" in cli("show", "./mine.yaml").stdout


def test_consolidate_writes_plain_weights(tmp_path: Path) -> None:
    """Bugs: a file that torch reads only with pickle; an existing one is overwritten; a traceback."""
    import torch
    from typer.testing import CliRunner

    from stabletrain.cli.main import app
    from stabletrain.runtime.checkpoints import CheckpointInfo, Saver, Store

    def call(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["consolidate", *words])
        return done.exit_code, done.output

    weights = {"net._orig_mod.weight": torch.tensor([1.0, float("nan")])}
    saver = Saver(Store(tmp_path / "run" / "checkpoints"))
    saver.save({"state_dict": weights, "global_step": 3}, CheckpointInfo(step=3, run="a"), wait=True)
    file = tmp_path / "run" / "checkpoints" / "step-00000003.pt"
    code, text = call(str(tmp_path / "run"))
    assert code == 0
    assert f"wrote {file}: step 3" in text
    found = torch.load(file, weights_only=True)
    assert list(found) == ["net.weight"]
    assert found["net.weight"].isnan().tolist() == [False, True]
    code, text = call(str(tmp_path / "run"), "-o", str(file))
    assert (code, "already exists" in text.replace("\n", " ")) == (2, True)
    code, text = call(str(tmp_path))
    assert (code, "there is none in" in text.replace("\n", " ")) == (2, True)
    code, text = call(str(tmp_path / "run"), "--all", "--output", str(tmp_path / "all.ckpt"))
    assert code == 0
    assert torch.load(tmp_path / "all.ckpt", weights_only=True)["global_step"] == 3


@pytest.fixture
def series(tmp_path: Path) -> Path:
    rows = ["2.0,0.5", "1.9,8.0", "nan,0.5", "1.8,inf", "1.7,0.4"]
    file = tmp_path / "series.csv"
    file.write_text("\n".join(["step,loss,grad_norm", *(f"{step},{row}" for step, row in enumerate(rows))]) + "\n")
    return file


def test_replay_clips_and_skips(cli, series: Path) -> None:
    """Bug: a wrong count, or non-finite rows that are dropped."""
    clip = cli("replay", "clip_norm", str(series), "max_norm=1")
    assert clip.returncode == 0, clip.stderr
    assert "5 steps, 1 clipped (20.00%), 0 skipped" in clip.stdout
    skip = cli("replay", "skip_nonfinite", str(series))
    assert "2 skipped (40.00%)" in skip.stdout
    assert "step 2: " in skip.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss,norm\n1,2\n", ["lacks the column grad_norm"]),
        ("", ["lacks the column", "an empty file"]),
        ("loss,grad_norm\n", ["no rows"]),
        ("loss,grad_norm\n1,2\n1,x\n", ["line 3", "grad_norm='x'"]),
        ("loss,grad_norm\n1\n", ["line 2"]),
    ],
)
def test_replay_of_a_broken_file(cli, tmp_path: Path, text: str, words: list[str]) -> None:
    """Bug: a traceback, or a message without the file and line."""
    (tmp_path / "bad.csv").write_text(text)
    done = cli("replay", "norm", "bad.csv")
    assert done.returncode == 2
    for word in ("bad.csv", *words):
        assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clip_nrom", "series.csv"], ["did you mean 'clip_norm'"]),
        (["clip_norm", "nowhere.csv"], ["nowhere.csv", "cannot be read"]),
        (["clip_norm", "series.csv", "max_nrm=3"], ["max_nrm", "did you mean 'max_norm'"]),
        (["clip_norm", "series.csv", "max_norm=big"], ["max_norm", "expected float"]),
        (["clip_norm", "series.csv", "max_norm=-1"], ["max_norm"]),
        (["clip_norm", "series.csv", "max_norm"], ["expected key=value"]),
        (["schedule_lr", "series.csv"], ["expected one of the rules"]),
    ],
)
def test_replay_of_a_wrong_rule(cli, series: Path, arguments: list[str], words: list[str]) -> None:
    """Bug: a traceback, or a misspelt argument that is ignored."""
    done = cli("replay", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("redirect", "words"), [("> /dev/full", ["cannot write the output"]), ("| true", []), (">&-", [])]
)
def test_output_that_cannot_be_written(redirect: str, words: list[str]) -> None:
    """Bug: a traceback, and a second one when the interpreter ends."""
    command = f"{sys.executable} -m stabletrain ls {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: exit code 1, or a traceback, from Ctrl-C while a config is composed."""
    from stabletrain.cli import listing
    from stabletrain.cli.main import main

    def interrupted(what: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "print_tables", interrupted)
    monkeypatch.setattr(sys, "argv", ["stabletrain", "ls"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["validate"], ["ls"], ["show"], ["cp"], ["replay"], ["consolidate"], ["new-plugin"]],
    ids=" ".join,
)
def test_help_fits_80_columns(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: lines that a terminal wraps, or a sentence that is cut off with an ellipsis."""
    from typer.testing import CliRunner

    from stabletrain.cli.main import app

    monkeypatch.setenv("COLUMNS", "80")
    lines = CliRunner().invoke(app, [*command, "--help"]).output.splitlines()
    assert lines
    assert max(map(len, lines)) <= 80
    assert command or not [line for line in lines if line.endswith("...") and not line.startswith("Usage")]


def test_ls_shows_defaults_and_all_groups(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a config group that no table has, has no sentence there, or whose default is unknown."""
    from stabletrain.cli.listing import group_sentence, print_tables
    from stabletrain.config import discovery

    monkeypatch.setenv("COLUMNS", "80")
    print_tables("all")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for group, options in discovery.groups().items():
        name = group.removeprefix("plugins/")
        default = discovery.default_options().get(group, "")
        assert f"\n{name} " in text
        assert default == "" or [line for line in text.splitlines() if line.split()[:2] == [name, default]], group
        assert group_sentence(group, options).endswith(("?", "=OPTION)"))
