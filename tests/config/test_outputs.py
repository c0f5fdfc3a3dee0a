"""A recipe cannot make a run write outside of its folder; the command line can."""

import os
from pathlib import Path

import pytest

from stabletrain.config.compose import compose
from stabletrain.config.construct import instantiate
from stabletrain.config.outputs import Outputs, check_outputs, typed_keys
from stabletrain.config.validate import check

CALLBACKS = "lightning.pytorch.callbacks"
HEAD = "defaults: [train, {override model: digits_cnn}, {override data: digits}, _self_]\n"

OUTSIDE = [
    ("callbacks.x.dirpath", f"callbacks: {{x: {{_target_: {CALLBACKS}.ModelCheckpoint, dirpath: /home/u}}}}"),
    ("callbacks.x.dirpath", f"callbacks: {{x: {{_target_: {CALLBACKS}.ModelCheckpoint, dirpath: 'file:///home/u'}}}}"),
    ("callbacks.x.filename", f"callbacks: {{x: {{_target_: {CALLBACKS}.ModelCheckpoint, filename: ../../x}}}}"),
    ("callbacks.x.dirpath", f"callbacks: {{x: {{_target_: {CALLBACKS}.OnExceptionCheckpoint, dirpath: ~/x}}}}"),
    ("logger.save_dir", "logger: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: /x}"),
    ("logger.version", "logger: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: x, version: a/../../b}"),
    ("logger._args_[0]", "logger: {_target_: lightning.pytorch.loggers.CSVLogger, _args_: [/x]}"),
    ("logger.tracking_uri", "logger: {tracking_uri: 'http://example.com'}"),
    ("logger.tracking_uri", "logger: {tracking_uri: mlruns}"),
    ("trainer.profiler.dirpath", "trainer: {profiler: {_target_: lightning.pytorch.profilers.SimpleProfiler, "
     "dirpath: /x}}"),
    ("guard.events", "guard: {events: /x/events.jsonl}"),
    ("plugins.spike.spill", "plugins: {spike: {spill: a/../../b}}"),
    ("run_dir", "run_dir: /x"),
    ("run_dir", "run_dir: ~/.ssh"),
    ("callbacks.x.filename", f"callbacks: {{x: {{_target_: {CALLBACKS}.ModelCheckpoint, filename: '{{step:c}}x'}}}}"),
    ("callbacks.x.filename", f"callbacks: {{x: {{_target_: {CALLBACKS}.ModelCheckpoint, "
     "filename: '{step:{epoch}c}x'}}"),
    ("launch.sbatch.output", "launch: {sbatch: {output: /x}}"),
    ("launch.sbatch.output", "launch: {sbatch: {output: x}}"),
    ("launch.sbatch.export", "launch: {sbatch: {export: 'ALL,LD_PRELOAD=./x.so'}}"),
    ("launch.sbatch.wrap", "launch: {sbatch: {wrap: touch x}}"),
    ("guard.events", "anchor: {}\nguard: {events: '${run_dir}/../x'}\nrun_dir: a"),
]  # fmt: skip


def recipe(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(HEAD + text.replace("anchor: {}\n", ""))
    return str(folder / "mine.yaml")


@pytest.mark.parametrize(("key", "text"), OUTSIDE)
def test_a_recipe_names_no_place_outside(key: str, text: str, tmp_path: Path) -> None:
    """Bug: a class of the right kind writes anywhere, if a stranger's recipe says where."""
    found = {problem.key: problem.text for problem in check(compose(recipe(tmp_path, text)))}
    assert f"add {key}=" in found[key]
    assert "only the command line may set" in found[key]


@pytest.mark.parametrize("typed", ["{key}=/x", "++{key}=/x"])
@pytest.mark.parametrize("key", ["guard.events", "plugins.spike.spill", "run_dir", "logger.tracking_uri"])
def test_the_command_line_may_name_any_place(key: str, typed: str, tmp_path: Path) -> None:
    """Bug: users cannot put a run's files where they want them."""
    composed = compose(recipe(tmp_path, "seed: 1"), [typed.format(key=key)])
    assert list(check_outputs(composed.config, typed_keys(composed.overrides))) == []


def test_what_a_recipe_reads_and_ordinary_text_are_no_outputs() -> None:
    """Bug: data, metrics with a slash and patterns are taken for paths to write."""
    config = {
        "data": {"path": "/datasets/x", "folder": "../x"},
        "model": {"save_dir": "/x"},
        "resume": "/runs/x",
        "plugins": {"spike": {"replay": "/runs/x"}, "checkpoints": {"monitor": "val/loss", "folder": "best/a..b"}},
        "callbacks": {"x": {"filename": "{epoch:02d}-{val_acc:.2f}-{step}"}},
        "trainer": {"max_time": "00:01:00:00"},
        "launch": {"sbatch": {"account": "a", "gres": "gpu:2", "mem": "3G", "exclusive": None, "time": "1-00:00:00"}},
    }
    assert list(check_outputs(config, [])) == []


def test_a_choice_of_an_option_types_no_values() -> None:
    # `logger=mlflow` would otherwise allow every value that the recipe gives to the logger
    overrides = ["logger=mlflow", "plugins/spike=rollback", "+callbacks={x: {dirpath: /a, n: [1]}}", "~guard", "a=["]
    assert typed_keys(overrides) == {"logger", "callbacks.x.dirpath", "callbacks.x.n"}
    config = {"logger": {"tracking_uri": "http://x"}, "callbacks": {"x": {"dirpath": "/a", "filename": "/b"}}}
    assert [problem.key for problem in check_outputs(config, typed_keys(overrides))] == [
        "callbacks.x.filename",
        "logger.tracking_uri",
    ]


def test_relative_places_are_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a recipe writes into the current folder; a path that was typed is not in the current one."""
    monkeypatch.chdir(tmp_path)
    run = Outputs(tmp_path / "run", frozenset({"callbacks.typed.dirpath"}))
    node = {"_target_": f"{CALLBACKS}.ModelCheckpoint", "dirpath": "best", "filename": "{step}"}
    made = instantiate(node, key="callbacks.x", outputs=run)
    assert (made.dirpath, made.filename) == (str(tmp_path / "run" / "best"), "{step}")
    assert instantiate(node, key="callbacks.typed", outputs=run).dirpath == str(tmp_path / "best")
    by_place = {"_target_": "lightning.pytorch.loggers.CSVLogger", "_args_": ["logs", "name"]}
    logger = instantiate(by_place, key="logger", outputs=run)
    assert (logger.save_dir, logger.name) == (str(tmp_path / "run" / "logs"), "name")
    spill = instantiate({"_target_": "stabletrain.Rollback", "spill": "s", "replay": "r"}, key="plugins.s", outputs=run)
    assert (spill.spill, spill.replay) == (str(tmp_path / "run" / "s"), "r")
    assert run.place("guard.events", "e.jsonl") == str(tmp_path / "run" / "e.jsonl")
    assert run.place("callbacks.typed.dirpath", "s3://bucket/x") == "s3://bucket/x"


def test_any_option_of_sbatch_may_be_typed() -> None:
    """Bug: users cannot choose where SLURM's own output goes, or what their mail address is."""
    overrides = ["+launch.sbatch.mail-user=me@example.com", "++launch.sbatch.output=/x"]
    config = {"launch": {"sbatch": {"mail-user": "me@example.com", "output": "/x"}}}
    assert list(check_outputs(config, typed_keys(overrides))) == []


@pytest.mark.parametrize("made", ["link", "inner link", "deep link", "pipe"])
def test_a_prepared_run_folder_leads_nowhere_else(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a recipe comes with a folder in which worker.log is a link to ~/.bashrc, or a pipe without end."""
    (tmp_path / "here").mkdir()
    (tmp_path / "precious").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    config = {"run_dir": "out"}
    assert list(check_outputs(config, ())) == []
    if made == "link":
        Path("out").symlink_to(tmp_path)
    else:
        Path("out", "checkpoints").mkdir(parents=True)
        Path("out", "last.ckpt").symlink_to("checkpoints/step.ckpt")
        assert list(check_outputs(config, ())) == []
    if made == "inner link":
        Path("out", "worker.log").symlink_to(tmp_path / "precious")
    if made == "deep link":
        Path("out", "checkpoints", "a").symlink_to(tmp_path)
    if made == "pipe":
        os.mkfifo("out/worker.log")
    assert [problem.key for problem in check_outputs(config, ())] == ["run_dir"]
    assert list(check_outputs(config, ["run_dir"])) == []
