"""A backbone that BackboneFinetuning has unfrozen is trained in a resumed run."""

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import ResumeExactly, SaveCheckpoints
from stabletrain.testing.trainer import quiet_trainer


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=0.05)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("train_bn", [True, False])
def test_a_backbone_that_was_unfrozen_is_trained_after_a_resume(train_bn, tmp_path):
    """Bug: the callback freezes it before every fit, and unfreezes it at the start of one epoch only: a run that
    resumes in a later epoch does not train it, without a word."""

    def fit(*callbacks, ckpt_path=None):
        seed_everything(1, verbose=False)
        finetuning = BackboneFinetuning(1, train_bn=train_bn, initial_denom_lr=1.0)
        trainer = quiet_trainer(ResumeExactly(), finetuning, *callbacks, max_epochs=4, default_root_dir=tmp_path)
        model = Net()
        trainer.fit(model, DataLoader(TensorDataset(torch.randn(24, 3)), 4, shuffle=True), ckpt_path=ckpt_path)
        return model

    whole = fit(SaveCheckpoints(tmp_path / "saved", every=1, keep_last=None))
    for step in (1, 6, 7, 12, 13, 20):
        again = fit(SaveCheckpoints(tmp_path / "again", every=None), ckpt_path=tmp_path / "saved" / f"step-{step:08d}")
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), (step, name)
