"""Ranks whose loaders have different lengths: refused before the first batch, since they would wait for each other.

The rank with fewer batches begins its next epoch, validates or ends while the others still train: their collectives no
longer belong together, schedules that count epochs give every rank another learning rate, and the run ends in a lost
connection. With ``max_steps`` within the first epoch of all ranks nothing of this happens, and nothing is refused.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stabletrain.errors import UserError
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals.packages import both

_MOST = 8
_checked: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()
"""Loaders that were compared already, and for what: each is compared once."""


def refuse_uneven_training(trainer: Trainer) -> None:
    """Compare the number of training batches in an epoch over all ranks. A collective, once for each train loader.

    Args:
        trainer: in a fit, at a batch.

    Raises:
        UserError: on all ranks, if they differ and some rank comes to the end of its epoch. Not if a loader has no
            length.
    """
    if trainer.world_size == 1 or not _is_new(loader_internals.combined_train_loader(trainer), "training"):
        return
    lengths = _lengths(trainer, float(trainer.num_training_batches))
    if _differ(lengths) and not _ends_before(trainer, min(lengths)):
        raise UserError(_message("train_dataloader", lengths, "limit_train_batches"))


def refuse_uneven_validation(trainer: Trainer) -> None:
    """Compare the number of validation batches, if a forward pass needs all ranks. A collective, once for each loader.

    It needs them if parameters are sharded, and if DistributedDataParallel sends buffers before each forward.

    Args:
        trainer: in a fit, at the start of a validation.

    Raises:
        UserError: on all ranks, if they differ.
    """
    if trainer.world_size == 1 or not _needs_all_ranks(trainer):
        return
    stage = "sanity check" if trainer.sanity_checking else "validation"
    if not _is_new(loader_internals.combined_validation_loader(trainer), stage):
        return
    batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    lengths = _lengths(trainer, sum(map(float, batches)))
    if _differ(lengths):
        raise UserError(_message("val_dataloader", lengths, "limit_val_batches"))


def _is_new(loader: object, stage: str) -> bool:
    stages = _checked.setdefault(loader, set()) if loader is not None else {stage}
    if stage in stages:
        return False
    stages.add(stage)
    return True


def _lengths(trainer: Trainer, length: float) -> list[int]:
    """The numbers of all ranks, by rank; -1 for a loader without a length."""
    mine = torch.tensor(int(length) if math.isfinite(length) else -1, device=trainer.strategy.root_device)
    found = [torch.empty_like(mine) for _ in range(trainer.world_size)]
    dist.all_gather(found, mine)
    return [int(each) for each in found]


def _differ(lengths: list[int]) -> bool:
    return -1 not in lengths and len(set(lengths)) > 1


def _ends_before(trainer: Trainer, batches: int) -> bool:
    """Whether the run ends within this number of batches, and its validations are at the same batches on all ranks."""
    validates = trainer.enable_validation and isinstance(trainer.val_check_interval, float)
    last = trainer.max_steps * trainer.accumulate_grad_batches
    return 0 <= last < batches and not (validates and trainer.val_check_interval != 1.0)


def _needs_all_ranks(trainer: Trainer) -> bool:
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        return bool(model.will_sync_module_buffers())  # type: ignore[no-untyped-call]
    sharded = any(isinstance(p, DTensor) for p in trainer.lightning_module.parameters())
    return sharded or isinstance(trainer.strategy, both(FSDPStrategy))


def _message(source: str, lengths: list[int], limit: str) -> str:
    shown = ", ".join(f"rank {rank}: {length}" for rank, length in enumerate(lengths[:_MOST]))
    more = ", ..." if len(lengths) > _MOST else ""
    return (
        f"{source}: expected as many batches in an epoch on every rank, got {shown}{more}. A rank that is through with "
        "its data leaves the others waiting for ever. Three ways out: cut all ranks to the shortest, "
        f"Trainer({limit}={min(lengths)}) (config key trainer.{limit}); give every rank the whole dataset and let "
        "Lightning divide it, use_distributed_sampler=True (config key trainer.use_distributed_sampler); or divide it "
        "with torch's DistributedSampler, drop_last=True, and the same batch size on every rank"
    )
