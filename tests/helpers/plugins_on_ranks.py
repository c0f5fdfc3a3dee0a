"""Trainings with plugins on several ranks, for `rank_pool.on_ranks`; each returns what the test compares."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW
from two_ranks import BATCHES, NAN_AT, Net, train

from stabletrain import CheckpointActivations, MeasureNoiseScale, SkipNonFinite, SwapOptimizer, UserError

NEW = partial(AdamW, betas=(0.9, 0.95))


def sgd(parameters: Any) -> SGD:
    """The optimizer that is replaced."""
    return SGD(parameters, 0.01, weight_decay=0.1)


def by_hand(parameters: Any) -> AdamW:
    """What `SwapOptimizer(NEW)` makes of `sgd`, for the parameters of `Net`: two matrices, a norm, three biases."""
    weight0, bias0, norm, norm_bias, weight3, bias3 = parameters
    groups = [{"params": [weight0, weight3], "weight_decay": 0.1}, {"params": [norm]}]
    return NEW([*groups, {"params": [bias0, norm_bias, bias3]}], lr=0.01, weight_decay=0.0)


def swapped(folder: Path, kind: str) -> tuple[list[tuple[int, int, float]], dict[str, Tensor], dict[str, Tensor]]:
    """Groups as (tensors, elements, decay), the weights with a swapped optimizer, and those with the module's own."""
    mine, trainer = train(folder, kind, SkipNonFinite(), SwapOptimizer(NEW), make_optimizer=sgd)
    groups = [
        (len(group["params"]), sum(each.numel() for each in group["params"]), group["weight_decay"])
        for group in trainer.optimizers[0].param_groups
    ]
    theirs, _ = train(folder, kind, SkipNonFinite(), make_optimizer=by_hand)
    return groups, mine, theirs


class Rows(Net):
    """Micro-batch i of a step is that of rank i, or on one rank the i-th of a window."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        number = batch_idx * self.trainer.world_size + self.global_rank
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        if number == 2 * NAN_AT + 1:
            x[1, 0] = torch.nan
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()


def noise(folder: Path, kind: str | None) -> list[float]:
    """The averages of `MeasureNoiseScale` with two micro-batches a step: on two ranks, or on one (kind None)."""
    measure = MeasureNoiseScale(decay=0.9, count=lambda batch: 16)
    options = {} if kind else {"accumulate_grad_batches": 2, "limit_train_batches": 2 * (BATCHES // 2)}
    if kind:
        options = {"limit_train_batches": BATCHES // 2}
    train(folder, kind, SkipNonFinite(), measure, make_optimizer=sgd, make=Rows, **options)
    return list(measure.averages)


class Blocks(Net):
    """With three blocks, each sharded by itself, and dropout."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer)
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3)]
        self.net = nn.Sequential(*blocks, nn.Linear(6, 1))

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(next(self.net.parameters()), DTensor):
            for each in self.net[:3]:
                fully_shard(each, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def checkpointed(folder: Path, kind: str) -> list[dict[str, Tensor]]:
    """The weights without `CheckpointActivations`, and with it."""
    ends = []
    for plugins in ([], [CheckpointActivations(r"net\.[0-2]")]):
        torch.manual_seed(3 + torch.distributed.get_rank() if torch.distributed.is_initialized() else 3)
        ends.append(train(folder, kind, SkipNonFinite(), *plugins, make_optimizer=NEW, make=Blocks)[0])
    return ends


class Idle(SGD):
    """Its step does nothing."""

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


def in_backward(parameters: Any) -> SGD:
    """Parameters change as gradients arrive."""
    listed = list(parameters)
    for p in listed:
        p.register_post_accumulate_grad_hook(_move)
    return SGD(listed, 0.01)


def _move(p: Tensor) -> None:
    with torch.no_grad():
        p.sub_(0.01)


def refused(folder: Path, kind: str, which: str) -> str:
    """The message for an optimizer that does not step when it is asked to."""
    make = {"idle": partial(Idle, lr=0.01), "in backward": in_backward}[which]
    try:
        train(folder, kind, SkipNonFinite(), make_optimizer=make)
    except UserError as error:
        return str(error)
    return "trained"
