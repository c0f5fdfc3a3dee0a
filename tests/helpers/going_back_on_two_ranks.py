"""Run by torchrun for test_snapshot_distributed.py: restores snapshots on two ranks, and asserts on each of them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import going_back
import torch
import torch.distributed as dist
import two_ranks
from going_back import Case, GoBack, compare
from lightning.pytorch import Callback, Trainer

import stabletrain as st
from stabletrain.core.events import Request, RequestKind
from stabletrain.core.rule import Observation


def zero(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer whose state is divided among the ranks; imported here, because its module warns at import."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2)


def strategy(name: str) -> dict[str, Any]:
    """The Trainer's arguments."""
    return {"strategy": two_ranks.strategy(name), "devices": 2}


EXACT: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    # name: the training, batches between snapshots, batch ends at which to restore (8 batches are an epoch)
    "plain": ({}, 3, (8,)),
    "shuffled, across an epoch's end": ({"shuffle": True, "noise": 0.1}, 3, (9, 14)),
    "validation": ({"shuffle": True, "validation": True}, 3, (9,)),
    "accumulation": ({"trainer": {"accumulate_grad_batches": 2}}, 2, (7,)),
}


class Damage(Callback):
    """Sets a weight of rank 1 to NaN before one batch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.at -= 1
        if self.at == 0 and trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.net[0].bias[0] = math.nan


class Asking(st.SkipNonFinite):  # type: ignore[name-defined,misc]
    """Requests a rollback after an attempted step."""

    plugin = "asking"

    def __init__(self, after: int) -> None:
        super().__init__()
        self.__dict__["after"] = after

    def observe(self, state: Any, outcome: Any) -> Any:
        asks = outcome.step + 1 == self.__dict__["after"]
        return Observation(state, (), (Request(RequestKind.ROLLBACK, "asking", "because"),) if asks else ())


def main(folder: Path) -> None:
    """Run all cases, and write the names of those that passed."""
    torch.set_num_threads(1)
    going_back.OPTIMIZERS["zero"] = zero
    going_back.Model.configure_model = two_ranks.shard  # type: ignore[method-assign]
    passed = []
    for name in ("ddp", "fsdp2"):
        for case, (options, every, at) in EXACT.items():
            options = {**options, "trainer": options.get("trainer", {})}

            def run(*callbacks: Callback, name: str = name, options: dict[str, Any] = options) -> Any:
                return Case(**{**options, "trainer": {**options["trainer"], **strategy(name)}}).fit(*callbacks)

            callback = GoBack(every, at)
            compare(run(), run(callback))
            assert callback.went_back == len(at)
            passed.append(f"{name}: {case}")
    reference = Case(optimizer="zero", trainer=strategy("ddp")).fit()
    compare(reference, Case(optimizer="zero", trainer=strategy("ddp")).fit(GoBack(3, (8,))))
    passed.append("zero")

    quick: dict[str, Any] = {"every": 3, "trust_after": 2, "rewarm": 0, "check_every": 1, "drop": "none"}
    reference = Case(trainer=strategy("ddp")).fit()
    rollback = st.Rollback(**quick)
    mended = Case(trainer={**strategy("ddp"), "default_root_dir": folder}).fit(st.SkipNonFinite(), rollback, Damage(8))
    compare(reference, mended)
    assert rollback.rollbacks == 1
    passed.append("damage on one rank")

    # of 8 batches of each rank, the last ones before the request are excluded on both, and the ranks stay in step
    asking = Asking(7)
    options: dict[str, Any] = {**strategy("ddp"), "default_root_dir": folder, "max_epochs": 1}
    rollback = st.Rollback(**{**quick, "drop": "since_snapshot"})
    model, trainer, _ = Case(shuffle=True, dropout=0.0, trainer=options).fit(asking, rollback)
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, (trainer.global_step, len(model.rows), [w.sum().item() for w in model.parameters()]))
    assert ranks[0] == ranks[1]
    assert len(rollback.excluded) > 0
    assert trainer.global_step == 8 - len(rollback.excluded)
    passed.append("excluded on both")

    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "passed.txt").write_text("\n".join(passed))
    two_ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
