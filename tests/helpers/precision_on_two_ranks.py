"""Run by two processes: fp16 with a fall-back and kept modules; an overflow that only one rank has decides for both."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from fits import run, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabletrain import SetPrecision, SkipNonFinite


class Module(LightningModule):
    """On rank 1 the gradients of batches 3 and 4 overflow in fp16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
        self.formats: list[torch.dtype] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2 * batch_idx + self.global_rank))
        y = self.net(x)
        self.formats.append(y.dtype)
        large = batch_idx in (3, 4) and self.global_rank == 1
        return (y.float() * (1e4 if large else 1.0)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def main(folder: Path) -> None:
    module = Module()
    precision = SetPrecision(
        "fp16_mixed", keep_fp32=["LayerNorm"], init_scale=2.0**10, min_scale=2.0**9, fall_back="bf16", cool_down=3
    )
    mine = trainer(
        precision, SkipNonFinite(), accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo")
    )
    run(mine, module, DataLoader(range(24), batch_size=None))
    weights = torch.cat([p.detach().float().flatten() for p in module.parameters()])
    both: list[Any] = [None, None]
    dist.all_gather_object(both, (weights, module.formats, mine.global_step, mine.precision_plugin.state_dict()))
    if mine.is_global_zero:
        (w0, f0, s0, p0), (w1, f1, s1, p1) = both
        torch.save(
            {
                "same": torch.equal(w0, w1) and (f0, s0, p0) == (f1, s1, p1),
                "steps": s0,
                "formats": [str(f) for f in f0],
            },
            folder / "result.pt",
        )
    two_ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
