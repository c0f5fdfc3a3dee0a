from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from stabletrain.config.compose import compose
from stabletrain.config.resume import checkpoint_of
from stabletrain.config.types import mismatch
from stabletrain.config.validate import check, check_node

TINY = str(Path(__file__).parents[1] / "launch" / "tiny.yaml")
OURS = [
    "model._target_=stabletrain.workloads.DigitsCNN",
    "data._target_=stabletrain.workloads.DigitsData",
]


def problems(*overrides: str) -> list[str]:
    return [str(problem) for problem in check(compose(TINY, [*OURS, *overrides]))]


def test_a_correct_config_has_no_problem() -> None:
    """Bug: a correct config is refused."""
    assert problems("plugins/clip=norm", "plugins/nonfinite=skip", "optimizer=adamw") == []


@pytest.mark.parametrize("group", ["optimizer", "precision", "strategy", "launch", "logger", "schedule", "trainer"])
def test_every_option_that_we_ship_fits_its_signature(group: str) -> None:
    # an option file whose key is not an argument would crash the first run that selects it
    from stabletrain.config.discovery import groups

    for name in groups()[group]:
        found = [each for each in problems(f"{group}={name}") if "there is no package 'torchao'" not in each]
        assert found == [], name  # torchao is in no extra that the tests install


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimzer=adamw", ["optimzer: there is no such key", "did you mean 'optimizer'"]),
        ("optimizer=adamw optimizer.wieght_decay=1", ["optimizer.wieght_decay: AdamW has no", "'weight_decay'"]),
        ("optimizer=adamw optimizer.lr=abc", ["optimizer.lr: expected float", "'abc' (str)"]),
        ("optimizer=adamw optimizer.lr='1e-3'", ["optimizer.lr: expected float", "(str)"]),
        ("optimizer.lr=1", ["optimizer: arguments are set (lr), but no option is selected", "optimizer=OPTION"]),
        ("trainer.max_epocs=3", ["trainer.max_epocs", "did you mean 'max_epochs'"]),
        ("trainer.max_steps=many", ["trainer.max_steps: expected int, got 'many'"]),
        ("trainer.max_steps=10.5", ["trainer.max_steps: expected int, got 10.5"]),
        ("trainer.precision=16-mixed", ["precision.precision: trainer.precision sets it too"]),
        ("trainer.logger=true", ["trainer.logger: use the group logger"]),
        ("trainer.devices=2", ["trainer.devices: launch.processes sets it; use launch.processes=2"]),
        ("strategy.strategy=[1]", ["strategy.strategy: expected str or Strategy, got [1]"]),
        ("precision.precision=bf16-mixd", ["precision.precision", "did you mean 'bf16-mixed'"]),
        ("plugins.spike.window=3", ["plugins.spike: arguments are set (window)", "no option is selected"]),
        ("plugins.spkie.window=3", ["plugins.spkie", "there is no slot 'spkie'; did you mean 'spike'"]),
        ("plugins.clip=3", ["plugins.clip: expected _target_ and its arguments", "got 3"]),
        ("plugins/clip=norm plugins.clip.max_nrm=3", ["plugins.clip.max_nrm: ClipNorm has no", "'max_norm'"]),
        ("plugins/clip=norm plugins.clip.max_norm=big", ["plugins.clip.max_norm: expected float, got 'big'"]),
        ("plugins/clip=norm plugins.clip.max_norm=-1", ["plugins.clip: ", "max_norm", "-1"]),
        ("callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping", ["callbacks.early.monitor", "needs"]),
        ("callbacks.early.patience=3", ["callbacks.early", "add callbacks.early._target_"]),
        ("callbacks.x._target_=lightning.pytorch.callbacks.ModelCheckpont", ["did you mean", "ModelCheckpoint'"]),
        ("seed=-1", ["seed: expected 0 to"]),
        ("guard.mode=fast", ["guard.mode: expected", "'fast'"]),
        ("guard.max_attempts=0", ["guard: Guard: max_attempts must be >= 1, or null, got 0"]),
        ("+guard.mod=auto", ["guard.mod: Guard has no argument 'mod'; did you mean 'mode'"]),
        ("seed=abc", ["seed: expected int"]),
        ("dry_run=3", ["dry_run: expected bool"]),
        ("dry_run=true memory=abc", ["memory: expected an amount of memory like '8GB'", "got 'abc'"]),
        ("dry_run=true memory=0GB", ["memory: expected more than nothing"]),
        (
            "dry_run=true memory=80",
            ["memory: expected an amount", "got 80 without a unit; write memory=80GB"],
        ),
        ("memory=80GB", ["memory: a dry run says whether the run fits", "add dry_run=true"]),
        ("objective=3", ["objective: expected"]),
        ("runtime.sigterm_every=0", ["runtime.sigterm_every: expected at least 1, got 0"]),
        ("runtime.sigterm_evry=5", ["runtime.sigterm_evry: there is no such key; did you mean 'sigterm_every'"]),
        ("launch.threads=0", ["launch.threads: expected at least 1"]),
        ("launch.kind=locl", ["launch.kind", "did you mean 'local'"]),
        ("launch.procs=2", ["launch.procs: there is no such key"]),
        ("launch.nodes=2", ["launch.nodes: several nodes need launch=torchrun with launch.rdzv=HOST:PORT"]),
        ("launch=torchrun launch.nodes=2", ["launch.rdzv: several nodes need the address at which they meet"]),
        ("launch=torchrun launch.rdzv=a:1", ["launch.rdzv: it is for several nodes"]),
        ("launch=torchrun launch.nodes=2 launch.rdzv=a", ["launch.rdzv: expected HOST:PORT", "got 'a'"]),
        ("launch=torchrun launch.join_timeout=0", ["launch.join_timeout: expected a time above 0"]),
        ("launch=slurm launch.sbatch.signal=B:TERM@60", ["launch.sbatch.signal: it is sent to the batch script alone"]),
        ("launch=slurm launch.sbatch.a_b=3", ["launch.sbatch.a_b: expected a long option"]),
        ("resume=/no/such.ckpt", ["resume: there is no checkpoint at '/no/such.ckpt'"]),
        ("resume=https://example.com/x.ckpt", ["resume: expected a path, got the URL 'https://"]),
        ("resume=/", ["resume: the folder / is no checkpoint"]),
        ("optimizer._target_=torch.optim.SGD", ["optimizer._partial_: expected true"]),
        ("callbacks.x._target_=torch.nn.Identity", ["callbacks.x: expected a Lightning callback, got a Identity"]),
        ("trainer.profiler._target_=torch.PyTorchFileWriter", ["trainer.profiler: expected a Profiler, got a"]),
        ("model.width={_target_:torch.nn.Identity}", ["model.width: expected int, got a node with _target_"]),
        ("launch.timeout=0", ["launch.timeout: expected a time above 0"]),
        ("launch.timeout=1e9", ["launch.timeout: expected int"]),
        (
            "strategy=ddp strategy._target_=lightning.pytorch.strategies.DDPStrategy",
            ["strategy._target_: expected one strategy, got an object", "strategy.strategy._target_="],
        ),
        ("strategy=ddp trainer.strategy=ddp", ["strategy.strategy: trainer.strategy sets it too"]),
        ("launch.threads=100000", ["launch.threads: expected at most 1024"]),
        ("launch.processes=100000", ["launch.processes: expected at most 1024"]),
        ("~launch.threads", ["launch.threads: this key is needed"]),
        ("~trainer.devices", ["trainer.devices: launch.processes sets it"]),
        ("~seed", ["seed: this key is needed"]),
        ("seed=true", ["seed: expected int"]),
        ("run_dir=", ["run_dir: expected a path, got ''"]),
        ("run_dir=/dev/null/x", ["run_dir: cannot write to /dev/null/x", "run_dir=FOLDER"]),
        ("guard.events=/nonexistent/x", ["guard.events: cannot write", "/nonexistent"]),
        ("guard.events=/", ["guard.events: cannot write", "no file"]),
        ("plugins/spike=rollback plugins.spike.spill=/nonexistent/x", ["plugins.spike.spill: cannot write"]),
        ("plugins/spike=rollback plugins.spike.spill=/dev/null", ["plugins.spike.spill: cannot write"]),
        ("plugins/spike=rollback plugins.spike.every=abc", ["plugins.spike.every: expected int"]),
        ("+chaos=nan_grad chaos.at_step=1 chaos.rank=99", ["chaos.rank: expected null or one of the 1 ranks"]),
        ("+chaos=nan_grad chaos.at_step=999", ["chaos.at_step: expected a step before the end"]),
        ("schedule=cosine schedule.total=0", ["schedule: total must be above 0", "schedule.total"]),
        ("schedule=cosine schedule.lr_warmup=99", ["lr_warmup must be no longer than the total of 5 steps"]),
        ("optimizer=adamw optimizer.lr=nan", ["optimizer.lr: expected a finite number, got nan"]),
        ("optimizer=adamw optimizer.betas=[0.9,inf]", ["optimizer.betas: expected a finite number, got inf"]),
        ("trainer.max_steps=-5", ["trainer.max_steps: expected at least 1, or -1"]),
        ("trainer.max_steps=0", ["trainer.max_steps: expected at least 1", "nothing is trained"]),
        ("trainer.limit_train_batches=0", ["trainer.limit_train_batches", "nothing is trained"]),
        ("trainer.val_check_interval=0", ["trainer.val_check_interval: expected above 0"]),
        ("trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches: expected at least 1"]),
        ("trainer.check_val_every_n_epoch=0", ["trainer.check_val_every_n_epoch: expected at least 1"]),
        ("trainer.log_every_n_steps=-1", ["trainer.log_every_n_steps: expected at least 0"]),
        ("trainer.max_time=00:00:00:00", ["trainer.max_time: expected more than no time"]),
        ("trainer.detect_anomaly=1", ["trainer.detect_anomaly: expected bool"]),
        ("plugins.clip=false", ["plugins.clip: expected _target_ and its arguments, got False", "plugins/clip=none"]),
        ("plugins.clip=''", ["plugins.clip: expected _target_ and its arguments, got ''"]),
        ("plugins.clip={}", ["plugins.clip: expected _target_ and its arguments, got {}"]),
        ("plugins=0", ["plugins: expected keys with values, got 0", "plugins/SLOT=OPTION"]),
        ("callbacks.x=0", ["callbacks.x: expected keys with values, got 0"]),
        ("optimizer=[adamw]", ["optimizer: expected one option, got a list"]),
        ("hydra.searchpath=[a]", ["hydra.searchpath", "remove it"]),
        ("resume=/dev/zero", ["resume: "]),
        ("run_dir='a\ab'", ["run_dir: expected a path without control characters"]),
        (f"run_dir={'a' * 5000}", ["run_dir: expected a path"]),
        ("model._target_=os.system", ["model._target_: 'os.system' may not be built"]),
    ],
)
def test_a_mistake_is_reported_with_its_key(override: str, words: list[str]) -> None:
    """Bug: a mistake that is found only when the worker builds it, or without its key or advice."""
    message = "\n".join(problems(*override.split()))
    for word in words:
        assert word in message


def test_all_mistakes_are_reported_once_and_together() -> None:
    """Bug: the user learns of one mistake per attempt, or of one twice."""
    found = problems("optimzer=x", "trainer.max_epocs=3", "seed=-1", "plugins/clip=nrom", "model.width=wide")
    assert len(found) == len(set(found)) == 5


def test_a_truncated_checkpoint_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """Bug: a damaged checkpoint is found after the run is opened in MLflow."""
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "truncated" in "".join(problems(f"resume={tmp_path}/cut.ckpt"))


def test_a_runs_folder_means_its_newest_checkpoint(tmp_path: Path) -> None:
    """Bug: the folder of a run is refused, or means a missing file."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert checkpoint_of(str(tmp_path)) is None
    (folder / "a.ckpt").touch()
    assert checkpoint_of(str(tmp_path)) == folder / "a.ckpt"


def test_inner_nodes_are_checked_with_their_full_key() -> None:
    """Bug: arguments of inner nodes are not checked, or named by a part of their key."""
    scaler = {"_target_": "torch.amp.GradScaler", "devise": "cpu"}
    plugin = {"_target_": "lightning.pytorch.plugins.precision.MixedPrecision", "device": "cpu", "scaler": scaler}
    node: dict[str, Any] = {"plugins": [plugin]}
    found = [str(problem) for problem in check_node(node, "precision")]
    assert found[0].startswith("precision.plugins[0].precision: MixedPrecision needs this argument")
    assert found[1].startswith("precision.plugins[0].scaler.devise: GradScaler has no argument 'devise'")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, float),
        ([1, 2], tuple[float, float]),
        ("a/b", Path),
        (None, int | None),
        (True, bool),
        (3.0, float),
        ("x", "X"),
    ],
)
def test_yaml_values_that_fit(value: object, hint: object) -> None:
    """Bug: a value that YAML writes differently, as 3 for 3.0, is refused."""
    assert mismatch(value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint"),
    [("3", int), ("1e-3", float), (True, int), (1.5, int), (3, str), ([1], int), (30, timedelta), ("PT3S", timedelta)],
)
def test_values_that_would_arrive_as_something_else(value: object, hint: object) -> None:
    # pydantic's lax mode takes "3" for 3, but it is the text that reaches the constructor
    assert mismatch(value, hint) is not None


@pytest.mark.parametrize("key", ["+chaos=inf_grad", "+chaos=nan_grad", "+chaos=nan_loss"])
def test_a_fault_may_be_a_number_that_is_not_finite(key: str) -> None:
    """Bug: NaN is refused where it is the default and the point."""
    assert problems(key, "chaos.at_step=1") == []


def test_nothing_is_made_while_a_path_is_checked(tmp_path: Path) -> None:
    """Bug: validation leaves folders behind."""
    words = [f"run_dir={tmp_path}/a/b", "plugins/spike=rollback", f"plugins.spike.spill={tmp_path}/c"]
    assert problems(*words, f"guard.events={tmp_path}/d") == []
    assert list(tmp_path.iterdir()) == []


def test_folders_of_files_to_write_may_be_missing(tmp_path: Path) -> None:
    """Bug: users have to make folders that the run makes itself."""
    words = ["plugins/spike=rollback", f"plugins.spike.spill={tmp_path}/a/b", f"guard.events={tmp_path}/c/d/e.jsonl"]
    assert problems(*words) == []


def test_the_folders_of_another_machine_are_not_checked() -> None:
    """Bug: a node's own disk is refused, because the login node has none."""
    words = ["plugins/spike=rollback", "plugins.spike.spill=/nonexistent/x", "guard.events=/nonexistent/e.jsonl"]
    assert problems(*words, "launch=slurm") == []
