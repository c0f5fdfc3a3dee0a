"""Hydra apps of other people get the groups of the plugins, and no others of ours."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import stabletrain
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


def run(app: Path, *overrides: str, warnings: str = "error::UserWarning") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", warnings, str(app), *overrides],
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
    assert stabletrain.callbacks(None) == []  # an app that selects nothing: cfg.get("plugins")


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


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["+plugins.clip._target_=os.system", "+plugins.clip.command=false"],
            "'os.system' may not be built from a config",
        ),
        (
            ["+plugins/clip=norm", "+plugins.clip.name={_target_:torch.PyTorchFileWriter,_args_:[PWNED]}"],
            "plugins.clip.name: expected str or None, got a node",
        ),
        # an escaped interpolation is text for the check, and must not be resolved when the object is built
        (
            ["+plugins/clip=norm", r"plugins.clip.name='\${oc.create:{_target_:psutil.Popen,args:[touch,PWNED]}}'"],
            "plugins.clip.name: expected a resolved value",
        ),
    ],
)
def test_a_config_cannot_run_any_function(
    app: Path, overrides: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs: the check of trust is only in our own command line; a config is resolved a second time."""
    from hydra import compose, initialize_config_dir

    monkeypatch.chdir(app.parent)
    with initialize_config_dir(str(app.parent / "conf"), version_base="1.3"):
        config = compose("mine", overrides)
    with pytest.raises(stabletrain.UserError) as caught:
        stabletrain.callbacks(config["plugins"])
    assert says in str(caught.value)
    assert not list(app.parent.rglob("PWNED"))


TEMPLATE = """
# the lines of lightning-hydra-template: src/train.py and src/utils/instantiators.py
import hydra
import lightning as L
import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from torch.utils.data import DataLoader, TensorDataset


def instantiate_callbacks(callbacks_cfg: DictConfig) -> list[Callback]:
    callbacks: list[Callback] = []
    if not callbacks_cfg:
        return callbacks
    if not isinstance(callbacks_cfg, DictConfig):
        raise TypeError("Callbacks config must be a DictConfig!")
    for _, cb_conf in callbacks_cfg.items():
        if isinstance(cb_conf, DictConfig) and "_target_" in cb_conf:
            callbacks.append(hydra.utils.instantiate(cb_conf))
    return callbacks


class Net(LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr, self.layer = lr, torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        return loss * (float("nan") if batch_idx == 2 else 1e6 if batch_idx == 3 else 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@hydra.main(version_base="1.3", config_path="conf", config_name="train.yaml")
def main(cfg: DictConfig) -> None:
    L.seed_everything(1)
    callbacks: list[Callback] = instantiate_callbacks(cfg.get("callbacks"))
    trainer: Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=False)
    assert all(each in trainer.callbacks for each in callbacks)
    trainer.fit(Net(cfg.lr), DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=1))
    print("CALLBACKS", [type(each).__name__ for each in callbacks])
    print("RESULT", {key: float(value) for key, value in trainer.callback_metrics.items()}, trainer.global_step)


main()
"""

TEMPLATE_CONF = {
    "train": "defaults:\n  - _self_\n  - callbacks: default\n  - trainer: default\nlr: 0.001\n",
    "trainer/default": """
        _target_: lightning.pytorch.trainer.Trainer
        default_root_dir: .
        max_epochs: 1
        accelerator: cpu
        enable_progress_bar: false
    """,
    "callbacks/default": "defaults:\n  - model_summary\n  - stable\n  - _self_\nmodel_summary:\n  max_depth: -1\n",
    "callbacks/model_summary": "model_summary:\n  _target_: lightning.pytorch.callbacks.ModelSummary\n  max_depth: 1\n",
    "callbacks/stable": """
        guard: {_target_: stabletrain.Guard, mode: exact}
        nonfinite: {_target_: stabletrain.SkipNonFinite, max_in_a_row: 5}
        spike: {_target_: stabletrain.Rollback, expect: [6, 50%]}
        value: {_target_: stabletrain.ClipValue, max_value: 1e5}
        monitor: {_target_: stabletrain.MonitorGradients}
        schedule: {_target_: stabletrain.ScheduleLR, kind: constant, lr_warmup: 0}
        save: {_target_: stabletrain.SaveCheckpoints, folder: saved, every: [4, 1ep]}
        resume: {_target_: stabletrain.ResumeExactly}
    """,
}


def test_the_callbacks_node_of_lightning_hydra_template(tmp_path: Path) -> None:
    """Bug: in the node ``callbacks`` a plugin becomes a DictConfig, which protects from nothing, or an error."""
    for name, text in TEMPLATE_CONF.items():
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("# @package _global_\n" * (name == "train") + textwrap.dedent(text))
    (tmp_path / "app.py").write_text(TEMPLATE)
    none = "+plugins/outliers@callbacks.outliers=none"
    done = run(tmp_path / "app.py", "+plugins/clip@callbacks.clip=zscore", none, warnings="default")
    names = "Guard SkipNonFinite Rollback ClipValue MonitorGradients ScheduleLR SaveCheckpoints ResumeExactly"
    assert f"CALLBACKS {['ModelSummary', *names.split(), 'ClipZScore']}" in done.stdout, done.stderr
    result = done.stdout.partition("RESULT ")[2]
    assert "skipped': 1.0" in result
    assert result.endswith(" 7\n")
