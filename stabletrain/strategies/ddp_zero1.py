"""Data parallelism whose optimizer state is divided over the ranks: ZeRO, stage 1."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.internals.schedulers import RateChange, mark_step, retarget

_JOINT = ("AdaGC", "Lamb", "Prodigy")
"""Optimizers whose step uses a number of all parameters together, which no rank would have."""


class _ZeRO1:
    """What the classes of both packages of Lightning share; see `DDPZeRO1Strategy`."""

    divides_optimizer = True
    """Each rank has the optimizer state of some parameters, and sends these to the others."""

    optimizers: list[Optimizer]
    lr_scheduler_configs: list[Any]
    _accelerator: Any

    @property
    def accelerator(self) -> Any:
        """Lightning's accelerator, of the package whose Trainer this strategy belongs to."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        if accelerator is not None and type(accelerator).__module__.startswith("pytorch_lightning."):
            self.__class__ = _OfPytorchLightning
        self._accelerator = accelerator

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Create the optimizers of the module, and divide the state of each over the ranks."""
        super().setup_optimizers(trainer)  # type: ignore[misc]
        before = self.optimizers
        self.optimizers = [divide(each) for each in before]
        for config in self.lr_scheduler_configs:
            for old, new in zip(before, self.optimizers, strict=True):
                if getattr(config.scheduler, "optimizer", None) is old is not new:
                    _move(config.scheduler, old, new)


def _move(scheduler: Any, old: Optimizer, new: Optimizer) -> None:
    groups = range(len(new.param_groups))
    if problem := retarget(scheduler, old, new, list(groups), [RateChange()] * len(groups)):
        raise UserError(f"ddp_zero1: cannot use the scheduler {type(scheduler).__name__}: {problem}. Use strategy=ddp")
    mark_step(new)


def divide(optimizer: Optimizer) -> Optimizer:
    """A ZeroRedundancyOptimizer whose optimizer on this rank is the given one, with this rank's parameters only.

    Args:
        optimizer: of all parameters; is changed. One that is divided already is returned as it is.

    Raises:
        UserError: if its step cannot be divided.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes long, and warns

    if isinstance(optimizer, ZeroRedundancyOptimizer):
        return optimizer
    name = type(optimizer).__name__
    if name in _JOINT:
        raise UserError(
            f"ddp_zero1: {name} uses a number of all parameters together in its step, but each rank has only some of "
            "them here. Use strategy=ddp, or another optimizer"
        )
    if callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None)):
        raise UserError(
            f"ddp_zero1: {name} changes the weights for evaluation (eval() and train()), each rank its own part only. "
            "Use strategy=ddp, or another optimizer"
        )

    def of_this_rank(groups: list[dict[str, Any]], **_: Any) -> Optimizer:
        held: set[Tensor] = {p for group in groups for p in group["params"]}
        optimizer.param_groups[:] = groups
        for p in [p for p in optimizer.state if p not in held]:
            del optimizer.state[p]
        return optimizer

    groups = [{key: value for key, value in group.items() if key != "param_names"} for group in optimizer.param_groups]
    defaults = copy.copy(optimizer.defaults)
    try:
        whole = [{**group, "params": list(group["params"])} for group in groups]
        return ZeroRedundancyOptimizer(whole, of_this_rank, **defaults)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(f"ddp_zero1: {error}. Use strategy=ddp, or parameters of one type") from error


if TYPE_CHECKING:

    class DDPZeRO1Strategy(_ZeRO1):
        """For type checkers."""

    _OfPytorchLightning = DDPZeRO1Strategy
else:
    _bases = both(DDPStrategy)

    class DDPZeRO1Strategy(_ZeRO1, *_bases):
        """DistributedDataParallel whose optimizer state is divided over the ranks (ZeRO, stage 1).

        A `DDPStrategy` of Lightning that wraps the optimizers of ``configure_optimizers`` in torch's
        ZeroRedundancyOptimizer: each rank updates some of the parameters, and sends them to the others. Weights are bit
        for bit those of ``ddp``; a checkpoint holds the state of all ranks, in the same form.

        Args:
            kwargs: those of Lightning's DDPStrategy.

        Raises:
            UserError: before the first step, if the step of the optimizer cannot be divided.
        """

    _OfPytorchLightning = type(
        "DDPZeRO1Strategy", (_ZeRO1, *reversed(_bases)), {"__doc__": DDPZeRO1Strategy.__doc__, "__module__": __name__}
    )
