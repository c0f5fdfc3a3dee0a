"""Run by two processes: what the ranks agree on when only one of them has a loss, and how each parameter is placed."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stabletrain import SkipNonFinite
from stabletrain.runtime.ranks import Ranks


class HalfSharded(two_ranks.Net):
    """Only the first layer is sharded."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(next(self.net[0].parameters()), DTensor):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class Plain(two_ranks.Net):
    """Nothing is sharded."""

    def configure_model(self) -> None:
        return


class Placements(Callback):
    """Records the placements at the end of the fit; after it the strategy has no model."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = Ranks(trainer)
        self.found = {name: ranks.placement(p) for name, p in pl_module.named_parameters()}


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def train(folder: Path, kind: str, module: Any) -> dict[str, Any]:
    records = Records()
    logging.getLogger("stabletrain").addHandler(records)
    placements = Placements()
    callbacks = [SkipNonFinite(), placements]
    _, mine = two_ranks.train(folder, kind, *callbacks, make_optimizer=lambda p: torch.optim.SGD(p, 0.01), make=module)
    logging.getLogger("stabletrain").removeHandler(records)
    ranks = Ranks(mine)
    rank = dist.get_rank()
    one_has_none, on_none = ranks.mean_loss([torch.tensor(3.0), torch.tensor(5.0)] if rank == 0 else [])
    nan_on_one, on_one = ranks.mean_loss([torch.tensor(float("nan") if rank else 1.0)], False, rank == 1, True)
    without, on_without = ranks.mean_loss([], rank == 0)
    assert one_has_none is not None
    assert nan_on_one is not None
    return {
        "placements": placements.found,
        "warned": [text for text in records.texts if "drift apart" in text],
        "one_has_none": one_has_none.item(),
        "none_has_one": without is None,
        "nan_on_one": repr(nan_on_one.item()),
        "flags": [[float(flag) for flag in flags] for flags in (on_none, on_one, on_without)],
        "any": [ranks.any(rank == 1), ranks.any(False)],
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    whole = two_ranks.Net
    cases = [("ddp", "ddp", whole), ("fsdp2", "fsdp2", whole), ("half", "fsdp2", HalfSharded), ("tp", "tp", Plain)]
    for name, kind, module in cases:
        result = train(folder, kind, module)
        (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(result))
    two_ranks.leave()
