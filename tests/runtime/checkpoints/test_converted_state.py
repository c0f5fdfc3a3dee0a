"""A run in 32 bits is resumed in 8, and back: through verified checkpoints, Lightning's files, with any plugin."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from fits import assert_same, everything
from lightning.pytorch.callbacks import ModelCheckpoint
from state_bits import ADAMW, Make, Small, of
from torch import Tensor
from torch.utils.data import DataLoader

from stabletrain import ResumeExactly, Rollback, SaveCheckpoints, ScheduleLR, SkipNonFinite
from stabletrain.errors import UserError
from stabletrain.launch.checkpoint_mismatch import explain_mismatch
from stabletrain.runtime.checkpoints.lightning_io import check_when_reading
from stabletrain.testing.trainer import quiet_trainer

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

WIDE = of("torch.optim.AdamW", **ADAMW)
NARROW = of("stabletrain.AdamW8bit")
FIRST, LAST = 6, 12


class Model(L.LightningModule):
    """Learns 3 batches; its embedding is a group of its own."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.small, self.make = Small(), make

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.small.net(batch), (batch * 7 + 3) % 64)

    def configure_optimizers(self) -> Any:
        return self.make(self.small.groups())


def fit(make: Make, last: int, *callbacks: Any, ckpt: Any = None, by_command: bool = False) -> Any:
    """Train until this step; with ``by_command`` as the command line's worker resumes."""
    data: Any = [torch.randint(0, 64, (32,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    trainer = quiet_trainer(*callbacks, max_steps=last)
    if by_command and ckpt:
        check_when_reading(trainer)
        explain_mismatch(trainer.strategy, str(ckpt))
    trainer.fit(Model(make), DataLoader(data, batch_size=None), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def lightnings(folder: Path) -> list[Any]:
    return [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)]


WAYS: dict[str, tuple[Callable[[Path], list[Any]], Callable[[Path], Path]]] = {
    "verified": (lambda folder: [SaveCheckpoints(folder, every=3), ResumeExactly()], lambda folder: folder),
    "command line": (lambda folder: [SaveCheckpoints(folder, every=3), ResumeExactly()], lambda folder: folder),
    "exactly": (lambda folder: [*lightnings(folder), ResumeExactly()], lambda folder: folder / f"step={FIRST}.ckpt"),
    "guard": (lambda folder: [*lightnings(folder), SkipNonFinite()], lambda folder: folder / f"step={FIRST}.ckpt"),
}


def moments(trainer: Any) -> list[Any]:
    return list(trainer.optimizers[0].state.values())


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_in_8_bits_and_back(way: str, tmp_path: Path) -> None:
    """Bugs: nobody converts the state when only this plugin is there; the rate of the schedule, the count of steps or
    the data start again; the resumed run in 8 bits, killed and resumed, is another one; the strategy stays changed; the
    command line refuses optimizers that are not torch's own, which have no option "differentiable"."""
    plugins, newest = WAYS[way]

    def run(make: Make, last: int, name: str, ckpt: Path | None = None) -> Any:
        schedule = ScheduleLR("cosine", lr_warmup=2, total=LAST)
        return fit(make, last, *plugins(tmp_path / name), schedule, ckpt=ckpt, by_command=way == "command line")

    kept = run(WIDE, LAST, "kept")
    run(WIDE, FIRST, "wide")
    wide = newest(tmp_path / "wide")
    done = run(NARROW, LAST, "narrow", wide)
    if way != "command line":
        assert "load_optimizer_state_dict" not in vars(done.strategy)
    assert {each["step"] for each in moments(done)} == {LAST}
    assert {each["state1"].dtype for each in moments(done)} == {torch.uint8, torch.float32}
    mine, theirs = (group["lr"] for each in (done, kept) for group in each.optimizers[0].param_groups[:1])
    assert mine == theirs
    before = torch.cat([p.flatten() for p in Small().parameters()])
    ends = [torch.cat([p.detach().flatten() for p in each.lightning_module.parameters()]) for each in (done, kept)]
    assert (ends[0] - ends[1]).norm() <= 0.05 * (ends[1] - before).norm()

    run(NARROW, FIRST + 3, "cut", wide)
    cut = tmp_path / "cut" / f"step={FIRST + 3}.ckpt"
    cut = cut if cut.exists() else cut.parent
    assert_same(everything(run(NARROW, LAST, "again", cut)), everything(done))

    back = run(WIDE, LAST, "back", cut)
    assert {float(each["step"]) for each in moments(back)} == {LAST}
    end = torch.cat([p.detach().flatten() for p in back.lightning_module.parameters()])
    assert (end - ends[1]).norm() <= 0.05 * (ends[1] - before).norm()


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamWFp8"])
def test_torchaos_state_is_converted_too(kind: str, tmp_path: Path) -> None:
    """Bugs: the learning rate is a number, which torchao's step refuses; state that is no plain tensor is not read."""
    pytest.importorskip("torchao")
    if os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        pytest.skip("its step is compiled, which takes minutes on a CPU: set TORCHDYNAMO_DISABLE=1")
    make = of(f"torchao.optim.{kind}", **ADAMW)
    fit(WIDE, FIRST, SaveCheckpoints(tmp_path / "wide", every=3))
    for folder in ("narrow", "again"):
        before = tmp_path / {"narrow": "wide", "again": "narrow"}[folder]
        saved = SaveCheckpoints(tmp_path / folder, every=3)
        fit(make, FIRST + 3, saved, ckpt=before, by_command=True)
    done = fit(WIDE, LAST, SaveCheckpoints(tmp_path / "back", every=3), ckpt=tmp_path / "narrow", by_command=True)
    assert {float(each["step"]) for each in moments(done)} == {LAST}


def test_what_does_not_convert_ends_before_the_first_step(tmp_path: Path) -> None:
    """Bugs: the message of `explain_mismatch` hides the one that says what to do; the checkpoint is changed."""
    fit(of("torch.optim.SGD", lr=0.1, momentum=0.9), FIRST, SaveCheckpoints(tmp_path, every=3))
    trainer = quiet_trainer(SaveCheckpoints(tmp_path / "other"), max_steps=LAST)
    explain_mismatch(trainer.strategy, str(tmp_path))
    with pytest.raises(UserError, match=r"AdamW8bit: .* of AdamW.* got momentum_buffer of SGD with momentum"):
        trainer.fit(Model(NARROW), DataLoader([torch.zeros(4, dtype=torch.long)], batch_size=None), ckpt_path=tmp_path)  # type: ignore[arg-type]


def test_a_script_without_plugins_is_unchanged(tmp_path: Path) -> None:
    """Bug: importing stabletrain changes what Lightning loads."""
    fit(WIDE, FIRST, *lightnings(tmp_path))
    with pytest.raises(KeyError):
        fit(of("bitsandbytes.optim.AdamW8bit", **ADAMW), LAST, ckpt=tmp_path / f"step={FIRST}.ckpt")


def test_a_rollback_reads_a_checkpoint_from_before_the_change(tmp_path: Path) -> None:
    """Bug: going back to a checkpoint in 32 bits gives the optimizer in 8 bits a state that it cannot use."""
    from stabletrain_plugins.rollback import older_checkpoint

    fit(WIDE, FIRST, *lightnings(tmp_path))
    path = str(tmp_path / f"step={FIRST}.ckpt")

    class Back(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == FIRST + 2 and not self.done:
                self.done = True
                older_checkpoint.restore(trainer.callbacks[0]._guard, path, "test")
                assert trainer.global_step == FIRST

        done = False

    done = fit(NARROW, LAST, SkipNonFinite(), Rollback(), Back())
    assert {each["step"] for each in moments(done)} == {LAST}
