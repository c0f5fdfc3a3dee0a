"""How long the processes of a run wait for each other: private attributes of Lightning's strategies and of torch."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from lightning.pytorch import Trainer

_DEFAULTS = ("default_pg_timeout", "default_pg_nccl_timeout")


def wait_at_most(trainer: Trainer, seconds: float) -> Callable[[], None]:
    """Set the timeout of a Trainer's process group, and of groups that are made later in this process.

    A timeout that the strategy was given is kept: an attribute ``timeout_was_given`` says so of strategies whose own
    default is not one of torch's. Torch takes that of later groups (the dimensions of a device mesh)
    not from the first one, but from defaults of 30 minutes, and 10 for NCCL.

    Args:
        trainer: before its fit.
        seconds: above 0.

    Returns:
        A function that restores the defaults that were set before.
    """
    if not dist.is_available():
        return lambda: None
    module, strategy = dist.distributed_c10d, trainer.strategy
    before = {name: getattr(module, name) for name in _DEFAULTS}
    # torch's own, whatever an earlier call has set
    defaults = [getattr(dist.constants, name, None) for name in _DEFAULTS]
    chosen = getattr(strategy, "_timeout", None)
    if not getattr(strategy, "timeout_was_given", chosen is not None and chosen not in defaults):
        chosen = timedelta(seconds=seconds)
        if hasattr(strategy, "_timeout"):
            strategy._timeout = chosen
    for name in _DEFAULTS:
        setattr(module, name, chosen)

    def undo() -> None:
        for name, value in before.items():
            setattr(module, name, value)

    return undo
