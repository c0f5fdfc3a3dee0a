"""Run by two processes: a GAN under DDP and two optimizers under FSDP2, with NaN on one rank only."""

import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from fits import Recorder, trainer
from gan import Gan
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabletrain import ClipNorm, SkipNonFinite

NAN_AT, BATCHES = 3, 6


class Shared(Gan):
    """Rank r of n sees every n-th row of a batch that is a function of its number alone.

    In batch 3 the discriminator's loss is NaN, of two ranks on the second only.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for net in (self.generator, self.discriminator):
            net[1] = nn.LayerNorm(8)  # statistics of a rank's own rows would differ

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(batch_idx)
        real, noise = torch.randn(8, 2, generator=generator), torch.randn(8, 4, generator=generator)
        if batch_idx == NAN_AT:
            real[1, 0] = math.nan
        rows = slice(self.global_rank, None, self.trainer.world_size)
        torch.manual_seed(batch_idx)
        super().training_step((real[rows], noise[rows], ""), batch_idx)


class Split(two_ranks.Net):
    """Two optimizers for the gradients of one loss: matrices and vectors."""

    def __init__(self, make_optimizer: Any = None) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        matrices, vectors = ([p for p in self.net.parameters() if (p.ndim > 1) is each] for each in (True, False))
        return torch.optim.SGD(matrices, 0.1), torch.optim.SGD(vectors, 0.1)


def train_gan(folder: Path, distributed: bool) -> dict[str, Any]:
    """On two ranks, or on one."""
    recorder = Recorder()
    module = Shared()
    options: dict[str, Any] = {"default_root_dir": folder, "use_distributed_sampler": False}
    if distributed:
        options |= {"strategy": DDPStrategy(process_group_backend="gloo", find_unused_parameters=True), "devices": 2}
    mine = trainer(recorder, ClipNorm(max_norm=0.3), SkipNonFinite(), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(does not have many workers|find_unused_parameters=True)")
        mine.fit(module, DataLoader(torch.zeros(BATCHES, 1)))
    return _result(list(module.state_dict().values()), recorder, mine.global_step)


def train_split(folder: Path, kind: str | None) -> dict[str, Any]:
    """On two ranks with a kind of strategy, or on one for None."""
    recorder = Recorder()
    weights, mine = two_ranks.train(folder, kind, recorder, SkipNonFinite(), make_optimizer=None, make=Split)  # type: ignore[arg-type]
    return _result(list(weights.values()), recorder, mine.global_step)


def _result(weights: list[Tensor], recorder: Any, step: int) -> dict[str, Any]:
    outcomes = [[(o.step, o.loss, o.grad_norm, o.skipped, o.clipped) for o in each] for each in recorder.states]
    return {"weights": weights, "outcomes": outcomes, "global_step": step}


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.save(train_gan(folder, True), folder / f"gan-{rank}.pt")
    for kind in ("ddp", "fsdp2"):
        torch.save(train_split(folder, kind), folder / f"{kind}-{rank}.pt")
    assert dist.is_initialized()
    two_ranks.leave()
