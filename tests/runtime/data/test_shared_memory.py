"""Tensors in shared memory are copied out of it, wherever in a batch they are; nothing else is touched."""

import os
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from fits import Net, run, trainer
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stabletrain import Rollback
from stabletrain.runtime.data.shared_memory import copy_shared_tensors


def shared() -> Tensor:
    return torch.arange(6.0).reshape(2, 3).t().share_memory_()


class Pair(NamedTuple):
    x: Tensor
    name: str


@dataclass(frozen=True)
class Frozen:
    x: Tensor


class Graph:
    def __init__(self) -> None:
        self.x, self.parts = shared(), [shared(), {"deep": shared()}]
        self.parts.append(self)


def tensors(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if id(value) in seen or isinstance(value, str):
        return []
    seen.add(id(value))
    inner = (
        value.values()
        if hasattr(value, "values")
        else value
        if isinstance(value, list | tuple)
        else vars(value).values()
    )
    return [each for item in inner for each in tensors(item, seen)]


@pytest.mark.parametrize(
    "make",
    [
        shared,
        lambda: [shared(), (shared(), "a")],
        lambda: UserDict(x=shared()),
        lambda: Pair(shared(), "a"),
        lambda: Frozen(shared()),
        Graph,
    ],
    ids=["tensor", "list", "UserDict", "named tuple", "frozen dataclass", "object"],
)
def test_every_shared_tensor_is_copied(make: Any) -> None:
    """Bugs: a file kept open by a tensor in a class of its own; another kind of container; other values or strides."""
    batch = make()
    copied = copy_shared_tensors(batch)
    assert type(copied) is type(batch)
    found = tensors(copied, set())
    assert found
    for each in found:
        assert not each.is_shared()
        assert torch.equal(each, shared())
        assert each.stride() == shared().stride()


def test_what_is_not_shared_is_the_same_object() -> None:
    """Bugs: a copy of every batch where there are no workers; one tensor under two names becomes two."""
    x, y = torch.ones(2), shared()
    batch = (x, {"x": x, "y": y, "again": y, "sparse": torch.eye(2).to_sparse(), "text": "a"})
    copied = copy_shared_tensors(batch)
    assert copied[0] is x
    assert copied[1]["y"] is copied[1]["again"]
    plain = (x, [x, "a"])
    assert copy_shared_tensors(plain) is plain


class Fields(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {f"k{field}": torch.full((6,), float(index)) for field in range(10)}


class FirstField(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["k0"]).square().mean()


class OpenFiles(Callback):
    most = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.most = max(self.most, len(os.listdir("/proc/self/fd")))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_the_tape_keeps_no_file_open() -> None:
    """Bug: a run with loader workers dies of "Too many open files", which without rollback it does not."""
    most = []
    for callbacks in ([], [Rollback(every=20, trust_after=10)]):
        watch = OpenFiles()
        loader = DataLoader(Fields(), batch_size=4, num_workers=2)
        run(trainer(*callbacks, watch, accumulate_grad_batches=4), FirstField(norm=False), loader)
        most.append(watch.most)
    assert most[1] <= most[0] + 8
