"""Fits on several ranks of which some would train different weights: each gives a rank's error, or its weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stabletrain import AccumulateFixed, Guard, SkipNonFinite, UserError


def rank() -> int:
    return int(os.environ["RANK"])


class HalfSharded(two_ranks.Net):
    """Only the first layer is sharded."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class FrozenRest(HalfSharded):
    """The first layer is sharded, all else frozen; one more parameter is trainable, and in no optimizer."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer)
        self.net[1:].requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.net[0].parameters())


class FrozenDiffers(FrozenRest):
    def configure_model(self) -> None:
        super().configure_model()
        self.net[1].weight.data += rank()


class Plain(two_ranks.Net):
    """Nothing is sharded, and all ranks see the same data."""

    def configure_model(self) -> None:
        return

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(batch_idx))
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()


class Wide(Plain):
    """A rank has a layer that the others do not have, as a stage of a pipeline does."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer)
        if rank():
            self.more = nn.Linear(2, 2)


class OtherSeed(Plain):
    """The last rank begins with other weights."""

    def configure_model(self) -> None:
        if rank() == int(os.environ["WORLD_SIZE"]) - 1:
            self.net[3].weight.data += 1e-6


class PartialGradient(Plain):
    """Each rank's gradient covers a part of the heads only."""

    def on_after_backward(self) -> None:
        grad = self.net[1].weight.grad
        assert grad is not None
        grad[rank() :: 2] = 0


class IgnoredByDDP(two_ranks.Net):
    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer)
        self._ddp_params_and_buffers_to_ignore = ["net.0.weight"]


class UnfrozenLater(two_ranks.Net):
    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer)
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.net[0].requires_grad_(True)


class WeightDamagedOnOne(two_ranks.Net):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        if rank() == 1:
            self.net[0].weight.data[0, 0] += 1e-6


class Unwrapped(DDPStrategy):
    """Does not wrap the model."""

    def configure_ddp(self) -> None:
        return


class AveragesItself(Unwrapped):
    averages_plain_gradients = True


class Averaged(two_ranks.Net):
    def on_after_backward(self) -> None:
        for p in self.parameters():
            dist.all_reduce(p.grad)
            p.grad.div_(self.trainer.world_size)  # type: ignore[union-attr]


class Hsdp(two_ranks.Net):
    """A two-dimensional mesh: shards, and copies of them on the other half of the ranks."""

    def configure_model(self) -> None:
        if not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


class CopiesOfShardsDiffer(Hsdp):
    def configure_model(self) -> None:
        super().configure_model()
        if rank() == 3:
            self.net[0].weight.to_local().data += 1e-6


class NeverSteps(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01, fused=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.01)


def overlapped(parameters: Any) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, overlap_with_ddp=True, lr=0.01)


def zero(parameters: Any) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, NeverSteps, lr=0.01)


class Silent(SkipNonFinite):
    """A plugin, first in the list, whose hook does not call the one of its base class."""

    def __init__(self) -> None:
        super().__init__(name="silent")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        return


class RateFromZero(Callback):
    """A learning rate of 0 in the first step, as a warmup has."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.01 * min(batch_idx, 1)


Case = tuple[Any, Callable[[Any], Any], Callable[[Any], torch.optim.Optimizer], list[Callback]]


def cases() -> dict[str, Case]:
    """Strategy, module, optimizer and callbacks."""
    gloo = {"process_group_backend": "gloo"}
    return {
        "half": ("fsdp2", HalfSharded, sgd, []),
        "nothing sharded": ("fsdp2", Plain, sgd, []),
        "unwrapped": (Unwrapped(**gloo), two_ranks.Net, sgd, []),
        "ignored": ("ddp", IgnoredByDDP, sgd, []),
        "unfrozen": ("ddp", UnfrozenLater, sgd, []),
        "averages itself": (AveragesItself(**gloo), Averaged, sgd, []),
        "frozen rest": ("fsdp2", FrozenRest, sgd, []),
        "frozen differs": ("fsdp2", FrozenDiffers, sgd, []),
        "tp": ("tp", Plain, adamw, []),
        "other seed": ("tp", OtherSeed, sgd, []),
        "missing": ("tp", Wide, sgd, []),
        "partial": ("tp", PartialGradient, sgd, []),
        "partial, warmup": ("tp", PartialGradient, sgd, [RateFromZero()]),
        "partial, device": ("tp", PartialGradient, adamw, [Guard(mode="device")]),
        "damaged": ("ddp", WeightDamagedOnOne, sgd, []),
        "overlap": ("ddp", two_ranks.Net, overlapped, []),
        "no step": ("ddp", two_ranks.Net, zero, []),
        "static": (DDPStrategy(static_graph=True, **gloo), two_ranks.Net, sgd, [AccumulateFixed(micro_batches=2)]),
        "leader without a word": ("tp", OtherSeed, sgd, [Silent()]),
        "no step, sharded": ("fsdp2", two_ranks.Net, lambda p: NeverSteps(p, 0.01), []),
    }


def cases_of_four() -> dict[str, Case]:
    return {
        "other seed": ("tp", OtherSeed, sgd, []),
        "hsdp": ("fsdp2", Hsdp, sgd, []),
        "shards differ": ("fsdp2", CopiesOfShardsDiffer, sgd, []),
    }


def fits(folder: Path, size: int) -> dict[str, tuple[str, int, list[Tensor]]]:
    """Of each case the message of a UserError, the applied steps, and the whole weights if it ended well."""
    found = {}
    for name, (kind, module, optimizer, callbacks) in (cases() if size == 2 else cases_of_four()).items():
        seen = Steps()
        try:
            stack = [*callbacks, SkipNonFinite(), seen]
            weights, _ = two_ranks.train(folder, kind, *stack, make_optimizer=optimizer, make=module)
            found[name] = ("", seen.applied, list(weights.values()))
        except UserError as error:
            found[name] = (str(error), seen.applied, [])
    return found


class Steps(Callback):
    """Counts the applied steps."""

    applied = 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.applied = trainer.global_step
