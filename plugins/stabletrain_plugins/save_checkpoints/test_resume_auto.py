"""``resume="auto"``: a script that is started again goes on from its folder's newest good checkpoint."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import elastic_script
import fits
import pytest
import rank_pool
import torch
from fits import HEALTHY, Net, assert_same, batches
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from processes import HELPERS, environment

from stabletrain import ResumeExactly, SaveCheckpoints, UserError
from stabletrain.runtime.checkpoints import CheckpointError, Store

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")

ITEMS = batches(*[HEALTHY] * 8)


def fit(folder: Path, steps: int, module: Any = None, resume: Any = None, **options: Any) -> Any:
    """Train in a folder as a script does that has been started again; the trainer."""
    saver = options.pop("saver", None) or SaveCheckpoints(folder / "c", every=3, resume="auto")
    more = options.pop("callbacks", [])
    options = {"max_steps": steps, "max_epochs": -1, "default_root_dir": folder, **options}
    return fits.fit(module or Net(dropout=0.2), ITEMS, ResumeExactly(), saver, *more, ckpt_path=resume, **options)


def steps_of(folder: Path) -> list[int]:
    return [entry.manifest.info.step for entry in Store(folder / "c").entries()]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What stabletrain has printed since the last call."""
    found = [each.getMessage() for each in caplog.records if each.name == "stabletrain"]
    caplog.clear()
    return found


def test_a_script_that_is_started_again_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: it starts from scratch; it goes on without a word; what goes on differs from an uninterrupted run."""
    whole = fit(tmp_path / "whole", 20)
    fit(tmp_path, 11)
    assert f"there is no checkpoint in {tmp_path / 'c'}" in caplog.text
    caplog.clear()
    mine = fit(tmp_path, 20)
    assert_same(fits.everything(mine), fits.everything(whole))
    assert lines(caplog) == [f"save_checkpoints: goes on from step 11 of {tmp_path / 'c'}"]


def test_an_optimizer_with_an_attribute_of_that_name_is_no_zero_redundancy_optimizer(tmp_path: Path) -> None:
    """Bug: a healthy run with checkpoints ends with an AttributeError before its first step."""

    class Named(torch.optim.SGD):
        optim = "sgd"

    class WithNamed(Net):
        def configure_optimizers(self) -> Any:
            return Named(self.parameters(), lr=0.1)

    assert fit(tmp_path, 4, WithNamed()).global_step == 4


def test_a_finished_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: a second start of a finished script trains nothing and says nothing; or trains on; or saves anew."""
    for folder, limits in ((tmp_path / "a", {}), (tmp_path / "b", {"max_epochs": 1})):
        steps = -1 if limits else 6
        first = fit(folder, steps, **limits)
        reached = first.global_step
        lines(caplog)
        again = fit(folder, steps, **limits)
        assert_same(fits.everything(again), fits.everything(first))
        (line,) = lines(caplog)
        assert line.startswith(f"save_checkpoints: goes on from step {reached} of ")
        assert "nothing left to train" in line
        assert steps_of(folder)[-2:] == ([6, 8] if limits else [3, 6])
    assert fit(tmp_path / "a", 10).global_step == 10  # a longer run is no other recipe


class Other(Net):
    """Another class with the same parameters."""


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[4] = torch.nn.Linear(16, 2)


Wider.__name__ = "Net"


def adamw(parameters: Any, lr: float = 0.01) -> Any:
    return torch.optim.AdamW(parameters, lr, weight_decay=0.1)


def split(parameters: Any) -> Any:
    first, *others = parameters
    return adamw([{"params": [first], "weight_decay": 0.0}, {"params": others}])


def net_with(make: Any) -> Net:
    module = Net()
    module.configure_optimizers = lambda: make(module.parameters())  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("module", "options", "texts"),
    [
        (Other, {}, ["model: Net in the checkpoint, Other now"]),
        (Wider, {}, ["parameters: 6 tensors, 161 numbers", "6 tensors, 178 numbers"]),
        (lambda: net_with(lambda p: torch.optim.SGD(p, 0.01)), {}, ["optimizer: AdamW in the checkpoint, SGD now"]),
        (lambda: net_with(lambda p: adamw(p, 0.02)), {}, ["optimizer lr: 0.01 in the checkpoint, 0.02 now"]),
        (
            lambda: net_with(split),
            {},
            ["optimizer groups: 6 tensors in the checkpoint, 1 tensors with weight_decay=0.0; 5 tensors now"],
        ),
        (lambda: Net(scheduler="step"), {}, ["schedulers: none in the checkpoint, LambdaLR now"]),
        (Net, {"precision": "64-true"}, ["types of the parameters: float32 in the checkpoint, float64 now"]),
    ],
)
def test_another_recipe_is_refused(tmp_path: Path, module: Any, options: dict[str, Any], texts: list[str]) -> None:
    """Bug: a checkpoint of another script in the folder is taken silently, or a changed argument without effect."""
    fit(tmp_path, 4, Net())
    with pytest.raises(UserError) as error:
        fit(tmp_path, 8, module(), **options)
    text = str(error.value)
    assert all(each in text for each in texts), text
    assert "SaveCheckpoints(folder=...)" in text
    assert "ckpt_path" in text
    assert steps_of(tmp_path) == [3, 4]


def test_a_ckpt_path_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a user who goes back to an older checkpoint, or resumes with another optimizer, gets the newest."""
    fit(tmp_path, 5)
    whole = fit(tmp_path / "whole", 9)
    lines(caplog)
    mine = fit(tmp_path, 9, resume=tmp_path / "c" / "step-00000003")
    assert_same(fits.everything(mine), fits.everything(whole))
    fit(tmp_path, 12, net_with(lambda p: adamw(p, 0.02)), resume=tmp_path / "c")
    assert not [line for line in lines(caplog) if "goes on" in line]


def test_the_folder_is_the_same_at_each_start(tmp_path: Path) -> None:
    """Bug: checkpoints go to the logger's folder, of which each start has a new one, so that nothing is ever found."""
    for steps in (4, 8):
        saver = SaveCheckpoints(every=None, resume="auto")
        fit(tmp_path, steps, saver=saver, logger=CSVLogger(tmp_path))
        assert saver.last == str(tmp_path / "checkpoints" / f"step-{steps:08d}")
    assert (tmp_path / "lightning_logs" / "version_1").exists()


def test_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: the damaged newest one stops the script; with damaged ones only, a long run starts from scratch."""
    fit(tmp_path, 5)
    whole = fit(tmp_path / "whole", 8)
    newest = max((tmp_path / "c").iterdir())
    file = newest / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    lines(caplog)
    mine = fit(tmp_path, 8)
    assert_same(fits.everything(mine), fits.everything(whole))
    assert "goes on from step 3" in " ".join(lines(caplog))
    for each in (tmp_path / "c").iterdir():
        (each / "state.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none in "):
        fit(tmp_path, 9)


def test_a_second_fit_of_one_trainer_goes_on_from_where_it_is(tmp_path: Path) -> None:
    """Bug: weights that the script has changed between two fits are set back to the checkpoint's."""
    saver, module = SaveCheckpoints(tmp_path / "c", resume="auto"), Net()
    mine = fits.fit(module, ITEMS, saver, max_steps=4, max_epochs=-1)
    with torch.no_grad():
        module.net[0].weight.zero_()
    mine.fit_loop.epoch_loop.max_steps = 4
    fits.run(mine, module, ITEMS)
    assert not module.net[0].weight.any()


def test_the_seed_is_part_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the second of several seeds in one folder trains nothing, and has the first one's weights."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    seed_everything(1, verbose=False)
    fit(tmp_path, 4)
    seed_everything(2, verbose=False)
    with pytest.raises(UserError, match="seed: 1 in the checkpoint, 2 now"):
        fit(tmp_path, 4)


def test_the_first_start_leaves_the_training_alone(tmp_path: Path) -> None:
    """Bug: a healthy run has other bits than without the argument."""
    with_it = fit(tmp_path / "a", 20)
    without = fit(tmp_path / "b", 20, saver=SaveCheckpoints(tmp_path / "b", every=3))
    assert_same(fits.everything(with_it), fits.everything(without))


@pytest.mark.slow
def test_a_killed_process_that_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: what a kill leaves behind is not gone on from, or not exactly."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "")  # the script sets it
    whole = elastic_script.main(make(tmp_path / "whole"), "single")
    folder, kill = make(tmp_path / "killed"), "0:14"
    with pytest.raises(rank_pool.RanksFailed) as error:
        rank_pool.on_ranks(elastic_script.main, 1, folder, "single", kill)
    assert error.value.codes == [-signal.SIGKILL]
    (mine,) = rank_pool.on_ranks(elastic_script.main, 1, folder, "single", kill)
    assert re.search("goes on from step (8|12) of", (folder / "rank0.log").read_text())  # 12: if it was written in time
    assert_same(mine, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kill", "steps"), [("ddp", "1:7", ["4"]), ("fsdp2", "0:17", ["12", "16"])])
def test_torchrun_starts_the_ranks_again(tmp_path: Path, kind: str, kill: str, steps: list[str]) -> None:
    """Bugs: ranks that go on from different steps, or from scratch; a start that hangs in the killed ranks' store."""
    (whole, _) = rank_pool.on_ranks(elastic_script.main, 2, make(tmp_path / "whole"), kind)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    script = [elastic_script.__file__, make(tmp_path / "killed"), kind, kill]
    done = subprocess.run(
        [*command, *map(str, script)],
        env=environment(HELPERS, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (step,) = re.findall("goes on from step ([0-9]+) of", done.stderr)
    assert step in steps
    assert_same(torch.load(tmp_path / "killed" / "final.pt"), whole)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_folder_that_cannot_be_written_ends_the_fit_before_training(tmp_path: Path) -> None:
    """Bugs: a script trains to its end without any checkpoint; its message names a config key."""
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match=r"no folder.*SaveCheckpoints\(folder=") as caught:
        fit(tmp_path, 3)
    assert "config key" not in str(caught.value)
    assert (tmp_path / "c").read_text() == "a file"
