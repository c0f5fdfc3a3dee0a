"""Run as a script: trains with ranks that Lightning starts by spawn or fork; prints what the parent knows then."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from fits import HEALTHY, NAN_LOSS, Net, batches, loader, trainer

from stabletrain import SaveCheckpoints, default_callbacks


def main(folder: Path, strategy: str) -> None:
    """Train for a few steps, one of which is dropped."""
    torch.set_num_threads(1)
    save = SaveCheckpoints(every=2, monitor=None)
    module = Net(norm=False)
    mine = trainer(
        *default_callbacks(), save, strategy=strategy, devices=2, default_root_dir=folder, use_distributed_sampler=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine.fit(module, loader(batches(*[HEALTHY] * 3, NAN_LOSS, HEALTHY)))
    print("RESULT", json.dumps({
        "best": mine.checkpoint_callback.best_model_path,  # type: ignore[union-attr]
        "last": save.last,
        "skipped": float(mine.callback_metrics["skipped"]),
        "finite": all(bool(p.isfinite().all()) for p in module.parameters()),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
