"""DistributedDataParallel: which parameters it keeps equal on all ranks, and what runs within its reducer."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stabletrain.runtime.internals.packages import both


def ddp_parameters(model: nn.Module | None) -> set[Tensor]:
    """The parameters whose initial values a DistributedDataParallel in a model, or around it, sends to all ranks.

    It averages the gradients of those that require one when it is constructed. Left out are parameters that it was
    told to ignore.
    """
    wrappers = [] if model is None else [each for each in model.modules() if isinstance(each, DistributedDataParallel)]
    return {p for each in wrappers for p in each._module_parameters}


def averages_weights_only(trainer: Trainer) -> bool:
    """Whether a DDPStrategy averages gradients within a node only, and weights over all ranks from time to time."""
    strategy = trainer.strategy
    return isinstance(strategy, both(DDPStrategy)) and isinstance(strategy._ddp_comm_state, PostLocalSGDState)


def overlaps_with_ddp(optimizer: Optimizer) -> bool:
    """Whether an optimizer is a ZeroRedundancyOptimizer that steps in a communication hook, during backward."""
    return bool(getattr(optimizer, "_overlap_with_ddp", False))


def communication_hook(trainer: Trainer) -> str | None:
    """The name of the function with which a DDPStrategy is told to send gradients; None: there is none."""
    strategy = trainer.strategy
    hook = strategy._ddp_comm_hook if isinstance(strategy, both(DDPStrategy)) else None
    return None if hook is None else getattr(hook, "__name__", type(hook).__name__)


def has_static_graph(trainer: Trainer) -> bool:
    """Whether a DDPStrategy is told that every step has the same graph."""
    strategy = trainer.strategy
    return isinstance(strategy, both(DDPStrategy)) and bool(strategy._ddp_kwargs.get("static_graph"))


def converts_batch_norm(trainer: Trainer) -> bool:
    """Whether a strategy replaces BatchNorm by SyncBatchNorm (``Trainer(sync_batchnorm=True)``)."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None
