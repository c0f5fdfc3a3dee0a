import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from stabletrain.cli.summary import next_commands
from stabletrain.config.compose import compose
from stabletrain.config.trust import TrustError
from stabletrain.config.validate import check_content, check_signatures
from stabletrain.errors import UserError
from stabletrain.launch.assemble import build_parts, outputs_of, override_optimizer, run_callbacks, trainer_arguments
from stabletrain.launch.checks import check_and_build
from stabletrain.launch.final_status import final_result
from stabletrain.launch.hand_over import without_paths_outside
from stabletrain.launch.launcher import FinishedJob, run_config
from stabletrain.launch.mlflow_run import MLFLOW_LOGGER, is_tracked, open_store
from stabletrain.launch.process import AGREED_ENDS_EXIT_0, ProcessEnd, worker_command, worker_environment
from stabletrain.launch.result import EXIT_CODES, MLFLOW_STATUS, Result, read_result
from stabletrain.launch.run_folder import (
    choose_run_folder,
    make_run_folder,
    read_run_yaml,
    remove_unused,
    write_run_yaml,
)
from stabletrain.launch.worker import main
from stabletrain.runtime.guard.options import Guard
from stabletrain.runtime.signal_watch import SignalWatch


@pytest.fixture(autouse=True)
def own_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("STABLETRAIN_TRUST", "tiny_workload")


@pytest.fixture
def signals_restored() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    yield
    for signum, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(signum, handler)


def test_the_optimizer_of_any_module_can_be_replaced(config: dict[str, Any]) -> None:
    """Bug: the module's own optimizer is used; or frozen parameters are given to the optimizer."""
    config["optimizer"] = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.5, "betas": [0.9, 0.95]}
    model = build_parts(config, SignalWatch()).model
    assert model is not None
    model.layer.bias.requires_grad_(False)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(model.layer.weight)]


def test_the_selected_optimizer_decays_no_biases(config: dict[str, Any]) -> None:
    """Bugs: one group that decays everything; options of ``param_groups`` without effect, or that nobody checks."""
    config["optimizer"] = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.5, "weight_decay": 0.2}
    config["param_groups"] = {"overrides": [{"pattern": r"layer\.bias", "lr_scale": 0.5}]}
    model = build_parts(config, SignalWatch()).model
    assert model is not None
    groups = model.configure_optimizers().param_groups  # type: ignore[union-attr]
    assert [(group["kind"], group["weight_decay"], group["lr"]) for group in groups] == [
        ("weight", 0.2, 0.5),
        ("bias", 0.0, 0.25),
    ]
    config["param_groups"] = {"overrides": [{"pattern": "head", "decay": False}], "layer_decay": 0}
    (problem,) = check_signatures(config)
    assert (problem.key, problem.text) == ("param_groups.layer_decay", "expected a number above 0 and at most 1, got 0")
    del config["param_groups"]["layer_decay"]
    assert [each.key for each in check_and_build(config, SignalWatch())[1]] == ["param_groups.overrides[0].pattern"]
    config["optimizer"] = None
    (problem,) = check_signatures(config)
    assert (problem.key, problem.text[-10:]) == ("param_groups", "select one")


def test_replacing_the_optimizer_does_not_change_the_class(config: dict[str, Any]) -> None:
    # a second model of the class in one process would train with the first one's optimizer
    import tiny_workload

    model = tiny_workload.TinyModel()
    override_optimizer(model, {"_target_": "torch.optim.AdamW", "_partial_": True})
    assert isinstance(tiny_workload.TinyModel().configure_optimizers(), torch.optim.SGD)


def test_callbacks_come_in_the_configs_order(config: dict[str, Any], tmp_path: Path) -> None:
    """Bug: the order of callbacks depends on the kind of node."""
    config["plugins"] = {
        "nonfinite": {"_target_": "stabletrain.SkipNonFinite"},
        "clip": {"_target_": "stabletrain.ClipNorm"},
    }
    config["callbacks"] = {"stop": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "loss"}}
    names = [type(callback).__name__ for _, callback in run_callbacks(config, {}, tmp_path)]
    assert names == ["SkipNonFinite", "ClipNorm", "EarlyStopping", "ModelCheckpoint", "ProgressLines"]


def test_an_own_model_checkpoint_replaces_ours_and_saves_in_the_run_folder(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """Bug: two checkpoint callbacks write the same files; or the user's writes into the current folder."""
    config["callbacks"] = {"best": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": "val_loss"}}
    (found,) = (c for _, c in run_callbacks(config, {}, tmp_path) if isinstance(c, ModelCheckpoint))
    assert found.monitor == "val_loss"
    assert found.dirpath == str(tmp_path)


def test_without_checkpointing_and_bar_there_are_none(config: dict[str, Any], tmp_path: Path) -> None:
    # Lightning raises if the callback is there although it was switched off
    assert run_callbacks(config, {"enable_checkpointing": False, "enable_progress_bar": False}, tmp_path) == []


def test_the_guards_options_are_a_callback_only_where_they_are_changed(tmp_path: Path) -> None:
    """Bugs: guard.mode on the command line without effect; a guard in a run that has no plugin and asked for none."""
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False}
    given: dict[str, Any] = {"guard": {"mode": "auto", "max_attempts": None, "events": None}}
    assert run_callbacks(given, quiet, tmp_path) == []
    given["guard"] |= {"mode": "exact", "max_attempts": 7}
    ((_, guard),) = run_callbacks(given, quiet, tmp_path)
    assert isinstance(guard, Guard)
    assert guard.guard_options() == {"mode": "exact", "max_attempts": 7, "events": None}


def test_precision_may_be_a_plugin_object(config: dict[str, Any]) -> None:
    """Bug: only names of precisions are accepted."""
    scaler = {"_target_": "torch.amp.GradScaler", "device": "cpu"}
    mixed = {"_target_": "lightning.pytorch.plugins.precision.MixedPrecision", "precision": "16-mixed", "device": "cpu"}
    config["precision"] = {"plugins": {**mixed, "scaler": scaler}}  # as the option fp16_mixed_cpu of version 0.1 was
    made = trainer_arguments(config)["precision.plugins"]
    assert type(made).__name__ == "MixedPrecision"
    assert isinstance(made.scaler, torch.amp.GradScaler)


def test_the_worker_does_not_trust_what_run_yaml_names(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # a downloaded run.yaml could name its own code as trusted
    monkeypatch.delenv("STABLETRAIN_TRUST")
    config["trust"] = ["tiny_workload"]
    with pytest.raises(TrustError, match=r"model\._target_: 'tiny_workload\.TinyModel'"):
        build_parts(config, SignalWatch())


def test_a_node_of_another_type_is_refused(config: dict[str, Any]) -> None:
    """Bug: an error far from its cause, when the Trainer calls a method that is missing."""
    config["model"] = {"_target_": "torch.nn.Identity"}
    with pytest.raises(UserError, match=r"model: expected a LightningModule, got a Identity from .*torch\.nn"):
        build_parts(config, SignalWatch())


@pytest.mark.usefixtures("signals_restored")
@pytest.mark.parametrize("text", ["", "[1]", "a: [", "recipe: x"])
def test_another_file_than_run_yaml_is_a_usage_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a traceback for an empty, broken or missing file."""
    (tmp_path / "run.yaml").write_text(text)
    assert main([str(tmp_path / "run.yaml")]) == 2
    assert main([str(tmp_path / "no.yaml")]) == 2
    assert main([]) == 2
    assert "run.yaml" in capsys.readouterr().err


def test_run_yaml_reads_back_equal(config: dict[str, Any], tmp_path: Path) -> None:
    # YAML reads 1e-3 back as a text, and a seed as 007 as seven
    (tmp_path / "run").mkdir()
    config["optimizer"] = {
        "lr": 1e-3,
        "eps": 1e-8,
        "betas": [0.9, 0.95],
        "text": "1e-3",
        "no": "no",
        "time": "01:00:00",
    }
    assert yaml.safe_load(write_run_yaml(config).read_text()) == config


def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: two runs in one second share a folder; or a run overwrites another."""
    monkeypatch.chdir(tmp_path)
    one, two = choose_run_folder("tiny", None), choose_run_folder("tiny", None)
    assert one != two
    assert one.parent == tmp_path / "runs" / "tiny"
    assert not one.exists()
    third = choose_run_folder("tiny", "here", job=3)
    assert third == tmp_path / "here" / "3"
    make_run_folder(third)
    with pytest.raises(UserError, match="already contains a run"):  # also while the first one is still being opened
        make_run_folder(third)
    with pytest.raises(UserError, match="run_dir: cannot write to /dev/null/x"):
        make_run_folder(choose_run_folder("tiny", "/dev/null/x"))


def test_what_was_made_for_a_run_that_did_not_start_is_removed(tmp_path: Path) -> None:
    """Bugs: the next attempt finds "already contains a run"; a folder of the user's is deleted with what is in it."""
    for existed in (False, True):
        folder = tmp_path / str(existed)
        make_run_folder(folder)
        if existed:
            (folder / "notes.txt").touch()
        remove_unused(folder, keep_folder=existed)
        assert [path.name for path in folder.glob("*")] == ["notes.txt"] * existed
        assert folder.exists() == existed
        make_run_folder(folder)


def test_commands() -> None:
    """Bugs: one process goes through torchrun, or several do not; a worker that imports from the current folder."""
    one = {"kind": "local", "processes": 1, "nodes": 1, "threads": 3}
    assert worker_command(one, "a.yaml")[1:] == ["-P", "-m", "stabletrain.worker", "a.yaml"]
    two = worker_command({**one, "processes": 2}, "a.yaml")
    assert two[1:8] == ["-P", "-m", "stabletrain.launch.torchrun", "--standalone", "--nproc-per-node", "2", "-m"]
    assert two[-1] == AGREED_ENDS_EXIT_0
    assert "stabletrain.launch.torchrun" in worker_command({**one, "kind": "torchrun"}, "a.yaml")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a setting that the worker needs is not in its environment, or overwrites the user's."""
    monkeypatch.setenv("STABLETRAIN_TRUST", "a")
    made = worker_environment({"threads": 3}, ["b"])
    assert made["OMP_NUM_THREADS"] == "3"
    assert made["STABLETRAIN_TRUST"] == "a,b"
    assert made["PYTHONSAFEPATH"] == "1"
    assert made["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize("end", EXIT_CODES)
def test_every_end_has_a_code_and_a_status(end: Any, tmp_path: Path) -> None:
    """Bug: an end without exit code or status; a NaN that makes result.json invalid."""
    assert (MLFLOW_STATUS[end] == "FINISHED") == (EXIT_CODES[end] == 0)
    result = Result(end=end, steps=3, metrics={"loss": float("nan")})
    result.write(tmp_path)
    found = read_result(tmp_path)
    assert found is not None
    assert (found.end, found.steps) == (end, 3)


@pytest.mark.parametrize(
    ("code", "end"), [(-9, "killed"), (137, "killed"), (143, "killed"), (1, "failed"), (0, "failed")]
)
def test_a_worker_without_a_result(code: int, end: str, config: dict[str, Any], tmp_path: Path) -> None:
    # exit code 0 without a result is no success either
    (tmp_path / "run").mkdir()
    result = final_result(config, ProcessEnd(code=code))
    assert result.end == end
    assert result.checkpoint is None


def test_the_checkpoint_of_a_killed_worker_is_found(config: dict[str, Any], tmp_path: Path) -> None:
    """Bug: after a SIGKILL the command that resumes was not among the suggested ones."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000005").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000005" / "manifest.json").touch()
    result = final_result(config, ProcessEnd(code=-9))
    assert result.checkpoint == str(folder / "checkpoints")
    job = FinishedJob(recipe="tiny", overrides=(), config={**config, "trust": []}, result=result)
    assert next_commands(job)[0] == f"stabletrain train tiny resume={folder}/checkpoints"


@pytest.mark.parametrize(("kind", "word"), [("divergence", "optimizer.lr=0.1"), ("replicas_differ", "resume=c")])
def test_after_ranks_have_differed_no_other_learning_rate_is_suggested(
    kind: str, word: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """Bug: a machine that flips bits is answered with a lower learning rate, from step 0."""
    (tmp_path / "events.jsonl").write_text(json.dumps({"step": 1, "plugin": "x", "kind": kind}) + "\n")
    of_run = {**config, "trust": [], "run_dir": str(tmp_path), "optimizer": {"lr": 0.3}}
    job = FinishedJob(recipe="tiny", overrides=(), config=of_run, result=Result(end="stopped", checkpoint="c"))
    assert next_commands(job)[1] == f"stabletrain train tiny {word}"


@pytest.mark.usefixtures("signals_restored")
@pytest.mark.parametrize("run_dir", ["elsewhere", "..", {"_target_": "x"}, None, 3])
def test_a_run_yaml_of_another_folder_is_refused(
    run_dir: object, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a file from anywhere says into which folder a run writes; a traceback for a folder that is no text."""
    config["run_dir"] = str(tmp_path / "run" / run_dir) if isinstance(run_dir, str) else run_dir
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(config))
    assert main([str(tmp_path / "run" / "run.yaml")]) == 2
    assert "run_dir: expected the file's own folder" in capsys.readouterr().err
    assert [each.name for each in tmp_path.rglob("*")] == ["run", "run.yaml"]


@pytest.mark.usefixtures("signals_restored")
def test_a_run_yaml_may_not_say_itself_that_its_paths_were_typed(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: with ``typed``, a run.yaml from anywhere makes a run write outside of its folder."""
    checkpoint = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": str(tmp_path / "outside")}
    config |= {"callbacks": {"x": checkpoint}, "typed": ["callbacks.x.dirpath"]}
    write_run_yaml_in(tmp_path / "run", config)
    assert main([str(tmp_path / "run" / "run.yaml")]) == 2
    assert "callbacks.x.dirpath: expected a path below the run's folder" in capsys.readouterr().err
    checkpoint["dirpath"] = "beside"
    write_run_yaml_in(tmp_path / "run", config)
    monkeypatch.chdir(tmp_path)
    outputs = outputs_of(without_paths_outside(config))
    assert outputs.place("callbacks.x.dirpath", "beside") == f"{config['run_dir']}/beside"


def write_run_yaml_in(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    write_run_yaml(config)


@pytest.mark.parametrize("logger", ["text", ["list"], 1])
def test_a_logger_that_is_no_node_is_not_tracked(logger: object) -> None:
    """Bug: a traceback of the launcher, before the worker's check has said what is wrong."""
    assert not is_tracked({"logger": logger})


def test_a_tracking_uri_that_is_no_text_is_refused(config: dict[str, Any]) -> None:
    """Bug: a traceback of the launcher, which makes the store ready while the worker checks."""
    config["logger"] = {"_target_": MLFLOW_LOGGER, "tracking_uri": {"_target_": "torch.PyTorchFileWriter"}}
    with pytest.raises(UserError, match=r"logger\.tracking_uri: expected text"):
        open_store(config)


def test_what_a_launcher_writes_is_what_a_worker_accepts(tmp_path: Path) -> None:
    """Bug: every SLURM job is refused, since run.yaml lacks a key that a config needs."""
    composed = compose(str(Path(__file__).parent / "tiny.yaml"))
    config = run_config(composed, []) | {"run_dir": str(tmp_path / "run")}
    write_run_yaml_in(tmp_path / "run", config)
    assert check_content(read_run_yaml(tmp_path / "run" / "run.yaml")) == []
    assert without_paths_outside(config)
