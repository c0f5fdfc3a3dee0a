"""Run by two processes: a change that the second rank alone announces; each rank saves its results."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from announced import TERM, Record
from lightning.pytorch import Callback, Trainer
from torch import Tensor

import stabletrain as st

AT = 8
"""The first batch after the change."""
CASES = [
    (kind, mode, hook)
    for kind, mode in (("ddp", "exact"), ("ddp", "device"), ("fsdp2", "exact"), ("fsdp2", "device"))
    for hook in ("none", "on_train_batch_start", "on_train_batch_end")
]


class Net(two_ranks.Net):
    """The loss is a thousand times as large from batch `AT` on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(batch_idx))
        x = x[self.global_rank :: self.trainer.world_size]
        loss: Tensor = (self.net(x) - x.sum(1, keepdim=True)).square().mean()
        return loss * 1000.0 if batch_idx >= AT else loss


class AnnouncesOnOneRank(Callback):
    """Announces the change on the last rank, in a hook."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._announce("on_train_batch_start", trainer, batch_idx)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._announce("on_train_batch_end", trainer, batch_idx + 1)

    def _announce(self, hook: str, trainer: Trainer, batch_idx: int) -> None:
        if hook == self.hook and batch_idx == AT and trainer.global_rank == trainer.world_size - 1:
            st.announce(trainer, TERM)


class SaveBefore(Callback):
    """Writes a checkpoint at the end of the batch before the change; the last in the list."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == AT - 1:
            trainer.save_checkpoint(self.path)


def train(folder: Path, kind: str | None, mode: Any, hook: str) -> dict[str, Any]:
    """On two ranks with a kind of strategy, or on one for None."""
    record, outliers = Record(), st.SkipOutliers(window=8, min_samples=4, regime_after=None)
    save = [SaveBefore(folder / f"{hook}-{mode}.ckpt")] if kind in (None, "ddp") else []
    callbacks = [AnnouncesOnOneRank(hook), outliers, st.SkipNonFinite(), st.Guard(mode=mode), record, *save]
    weights, _ = two_ranks.train(
        folder, kind, *callbacks, make_optimizer=lambda p: torch.optim.AdamW(p, 1e-4, fused=mode == "device"), make=Net
    )
    saved: Any = None
    if save:
        saved = torch.load(folder / f"{hook}-{mode}.ckpt", weights_only=True)["callbacks"]["skip_outliers"]["state"]
    return {
        "weights": list(weights.values()),
        "skipped": [outcome.skipped for outcome in record.outcomes],
        "losses": [outcome.loss for outcome in record.outcomes],
        "announced": [(e.step, e.reason) for e in record.events if e.kind == "announced"],
        "learned": len(outliers.state.loss.past.window),
        "saved": saved and len(saved["loss"]["past"]["window"]["values"]),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case in CASES:
        result = train(folder, *case)
        torch.save(result, folder / f"{'-'.join(case)}-{dist.get_rank()}.pt")
    two_ranks.leave()
