"""A fit that resumes trains what was trained at the checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fits import SaveAfter, assert_same, everything
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import ResumeExactly, Rollback, SkipNonFinite
from stabletrain.testing.trainer import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*already exist within another group:UserWarning"),
]


class Two(LightningModule):
    """Double precision, in which a checkpoint that is loaded before the module is converted is rounded."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.backbone.requires_grad_(not frozen)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].to(self.head.weight.dtype)
        return (self.head(self.backbone(x)) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)


class Change(Callback):
    """Changes what is trained at the beginning of the second epoch.

    Args:
        how: ``"group"``, ``"extend"``, ``"turn on"`` or ``"turn off"``.
    """

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch != 1:
            return
        optimizer, parameters = trainer.optimizers[0], list(pl_module.backbone.parameters())
        pl_module.backbone.requires_grad_(self.how != "turn off")
        if self.how == "group":
            optimizer.add_param_group({"params": parameters, "lr": 0.005})
        if self.how == "extend":
            optimizer.param_groups[0]["params"] += parameters


def train(how: str, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Any:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    change = BackboneFinetuning(1, verbose=False) if how == "finetuning" else Change(how)
    mine = quiet_trainer(change, ResumeExactly(), *callbacks, max_epochs=4, **options)
    mine.fit(Two(how in ("group", "extend")), DataLoader(TensorDataset(x), batch_size=4), ckpt_path=ckpt_path)
    return mine


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("how", ["group", "extend", "turn off", "turn on", "finetuning"])
def test_it_resumes_with_what_was_trained(how: str, precision: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Bugs: Lightning refuses the optimizer's state, or leaves frozen what was unfrozen; weights rounded to float32."""
    monkeypatch.chdir(tmp_path)
    batches = (5, 11, 23)
    saves = [SaveAfter(batch, Path(f"{batch}.ckpt")) for batch in batches]

    class Frozen(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if how == "turn on" and trainer.current_epoch == 0:
                pl_module.backbone.requires_grad_(False)

    plugins = [SkipNonFinite(), Rollback()]
    reference = train(how, Frozen(), *plugins, *saves, precision=precision)
    for batch in batches:
        again = [SaveAfter(999, Path("other.ckpt")) for _ in batches[:1]]
        resumed = train(
            how, Frozen(), SkipNonFinite(), Rollback(), *again, ckpt_path=f"{batch}.ckpt", precision=precision
        )
        assert_same(everything(resumed), everything(reference))
        assert resumed.global_step == 32
