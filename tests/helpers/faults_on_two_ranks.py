"""Run by torchrun for test_faults_distributed.py: faults on rank 1 only, and what both ranks make of them."""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabletrain import SkipNonFinite
from stabletrain.chaos import BadBatch, BadGradient, Fault, ScaledLoss, SlowRank
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.testing.trainer import quiet_trainer

warnings.filterwarnings("ignore")
FAULTS = {
    "nan_grad": lambda: BadGradient(at_step=2, rank=1),
    "nan_loss": lambda: ScaledLoss(at_step=2, rank=1),
    "bad_batch": lambda: BadBatch(at_step=2, rank=1),
    "slow_rank": lambda: SlowRank(at_step=2, seconds=0.1, steps=1, rank=1),
}


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Outcomes(GuardMember):
    def __init__(self) -> None:
        self.skipped: list[int] = []

    def on_outcome(self, outcome: object) -> None:
        if outcome.skipped:  # type: ignore[attr-defined]
            self.skipped.append(outcome.step)  # type: ignore[attr-defined]


def train(folder: Path, *faults: Fault) -> dict[str, object]:
    module, outcomes = Net(), Outcomes()
    ddp = DDPStrategy(process_group_backend="gloo")
    trainer = quiet_trainer(
        SkipNonFinite(), outcomes, *faults, max_epochs=1, devices=2, strategy=ddp, default_root_dir=folder
    )
    data = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(data, batch_size=4))
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return {"rank": trainer.global_rank, "weights": weights, "skipped": outcomes.skipped}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, make in {"none": None, **FAULTS}.items():
        result = train(folder / name, *([make()] if make else []))
        torch.save(result, folder / f"{name}-{result['rank']}.pt")
