"""Errors for strategies that do not train as the guard decides, each with what to use instead."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from stabletrain.errors import UserError
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.internals import ddp
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.compiled import uses_cuda_graphs
from stabletrain.runtime.internals.packages import both

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_strategy(trainer: Trainer, module: LightningModule, plugins: str) -> None:
    """Raise an error for a strategy that the guard does not support, before its processes are set up.

    Args:
        trainer: in ``setup`` of a fit, or before it.
        module: that is trained.
        plugins: names of those that need the guard.

    Raises:
        UserError: says what to use instead.
    """
    kind = type(trainer.strategy).__name__
    if trainer_internals.handles_own_steps(trainer):
        raise UserError(
            f"{plugins}: {kind} accumulates, clips and steps in its own engine. Use strategy=ddp or a "
            "ModelParallelStrategy (FSDP2), or remove these plugins."
        )
    if isinstance(trainer.strategy, both(FSDPStrategy)):
        raise UserError(
            f"{plugins}: {kind} is the first version of FSDP, which joins parameters into flat ones and keeps norms of "
            "shards to itself: each rank would decide on numbers of its own. Use FSDP2 (a ModelParallelStrategy with "
            "fully_shard), or strategy=ddp, or remove these plugins."
        )
    check_settings(trainer, module)


def check_settings(trainer: Trainer, module: LightningModule) -> None:
    """Raise an error for settings that Lightning ignores, or torch fails with in the first steps.

    Args:
        trainer: in ``setup`` of a fit, or before it.
        module: that is trained.

    Raises:
        UserError: says what to use instead.
    """
    check_accumulation(trainer)
    _check_cuda_graphs(trainer, module)
    if trainer.world_size == 1 or not isinstance(trainer.accelerator, both(CPUAccelerator)):
        return
    if hook := ddp.communication_hook(trainer):
        raise UserError(
            f"DDPStrategy(ddp_comm_hook={hook}): Lightning registers communication hooks on GPUs only, and ignores "
            "this one on the CPU: gradients would be sent as they are. Remove ddp_comm_hook, or train on GPUs."
        )
    converts = ddp.converts_batch_norm(trainer)
    for name, child in module.named_modules():
        if isinstance(child, nn.SyncBatchNorm) or (converts and isinstance(child, _BATCH_NORMS)):
            raise UserError(
                f"{name} would be a SyncBatchNorm, which torch has for GPUs only: it fails in the first forward on the "
                "CPU. Use BatchNorm, whose statistics are those of each rank's own samples (config key "
                "trainer.sync_batchnorm=false), or a norm without statistics of the batch (GroupNorm, LayerNorm)."
            )


def _check_cuda_graphs(trainer: Trainer, module: LightningModule) -> None:
    on_cuda = isinstance(trainer.accelerator, both(CUDAAccelerator))
    if on_cuda and (largest := AccumulationWindow(trainer).largest) > 1 and uses_cuda_graphs(module):
        raise UserError(
            'torch.compile(mode="reduce-overhead") cannot accumulate gradients, got windows of '
            f"{largest} micro-batches: a CUDA graph writes the gradients of each micro-batch to the same memory, and "
            "torch fails in the second backward pass (pytorch issue 169545). Compile with another mode, or do not "
            "accumulate (config keys trainer.accumulate_grad_batches=1, plugins/accumulate=none)."
        )


def check_accumulation(trainer: Trainer) -> None:
    """Raise an error for a static graph of DistributedDataParallel together with gradient accumulation.

    Args:
        trainer: in ``setup`` of a fit, or before it; again in it, since some plans of windows need the train loader.

    Raises:
        UserError: says what to use instead.
    """
    if ddp.has_static_graph(trainer) and (largest := AccumulationWindow(trainer).largest) > 1:
        raise UserError(
            f"DDPStrategy(static_graph=True) cannot accumulate gradients, got windows of {largest} micro-batches: its "
            "reducer expects every backward pass to be reduced, and fails with an internal assertion. Use "
            "strategy=ddp, or no accumulation (config keys trainer.accumulate_grad_batches=1, plugins/accumulate=none)."
        )
