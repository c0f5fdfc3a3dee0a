"""A restore without exclusions changes nothing; a restore that excludes batches equals a run without those batches."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict, deque
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from fits import assert_same
from going_back import Case, GoBack, compare, state_of
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain.runtime.snapshots.state_tree import Flattener, Restorer, SnapshotError
from stabletrain.testing.checks.equality import differences

CASES: dict[str, tuple[Case, int, tuple[int, ...]]] = {
    # name: the training, batches between snapshots, batch ends at which to go back (16 batches are an epoch)
    "plain": (Case(), 3, (8,)),
    "repeatedly": (Case(), 3, (8, 9, 20)),
    "across an epoch's end": (Case(shuffle=True), 3, (17,)),
    "at an epoch's last batch": (Case(), 3, (16,)),
    "at the very last batch": (Case(), 3, (32,)),
    "shuffled": (Case(shuffle=True), 3, (8, 30)),
    "data draw random numbers": (Case(noise=0.1, shuffle=True), 3, (8, 17)),
    "without a length": (Case(stream=True), 3, (8,)),
    "without a length, across epochs": (Case(stream=True, noise=0.1), 3, (17, 35)),
    "fp16": (Case(fp16=True), 3, (8, 20)),
    "accumulation": (Case(trainer={"accumulate_grad_batches": 2}), 2, (8, 21)),
    "accumulation, within a window": (Case(trainer={"accumulate_grad_batches": 4}), 4, (11,)),
    "sgd": (Case(optimizer="sgd"), 3, (8,)),
    "fused": (Case(optimizer="fused"), 3, (8,)),
    "learning rate in a tensor": (Case(optimizer="tensor-lr"), 3, (8,)),
    "new state tensors at each step": (Case(optimizer="lbfgs-like"), 3, (8,)),
    "8 bit": (Case(optimizer="adamw-8bit"), 3, (8,)),
    "validation within epochs": (Case(validation=True, trainer={"val_check_interval": 4}), 3, (8, 14)),
    "validation right after the snapshot": (Case(validation=True, trainer={"val_check_interval": 4}), 4, (10, 22)),
    "validation each epoch": (Case(validation=True), 3, (18,)),
    "max_steps": (Case(trainer={"max_epochs": -1, "max_steps": 20}), 3, (8, 19)),
}


@pytest.mark.parametrize("name", CASES)
def test_going_back_changes_nothing(name: str) -> None:
    # catches any state that is not part of the snapshot, or not restored where it was
    case, every, at = CASES[name]
    # with a loss scaler, a guard holds the global step at an overflow, which Lightning by itself does not
    reference = case.fit(GoBack(10**9, ())) if case.fp16 else case.fit()
    callback = GoBack(every, at)
    other = case.fit(callback)
    assert callback.went_back == len(at)
    assert len(other[0].rows) > len(reference[0].rows)
    compare(reference, other)


@pytest.mark.parametrize("at", [8, 17, 32])
@pytest.mark.parametrize("stream", [False, True])
def test_without_its_data_position_the_run_goes_on_with_the_next_batch(at: int, stream: bool) -> None:
    """Bugs: batches come twice or never; an epoch with too many batches; an average without some; old random numbers.

    16 batches are an epoch.
    """
    case = Case(noise=0.1, shuffle=not stream, stream=stream)
    reference, whole, _ = case.fit()
    model, trainer, _ = case.fit(GoBack(3, (at,), rewind=False))
    assert [row[1:3] for row in model.rows] == [row[1:3] for row in reference.rows]
    undone = at - (at // 3 - 1) * 3
    assert trainer.global_step == whole.global_step - undone
    assert len(model.averages) == len(reference.averages)
    assert model.seen_mean.weight == reference.seen_mean.weight
    assert torch.equal(state_of(model, trainer)["rng"], state_of(reference, whole)["rng"])
    steps, again = [row[0] for row in model.rows], reference.rows[at - undone : 32 - undone]
    assert steps == [*range(at), *range(at - undone, 32 - undone)]
    assert [row[3] for row in model.rows[at:]] == [row[3] for row in again], "the schedulers' rates"


@pytest.mark.slow
def test_worker_processes() -> None:
    # catches prefetched batches of workers that come twice, or with other random numbers
    case = Case(noise=0.1, shuffle=True, workers=2)
    callback = GoBack(3, (8, 17))
    compare(case.fit(), case.fit(callback))
    assert callback.went_back == 2


DROPPED = {
    # name: batch end at which to go back, how many of the last batches to exclude, their positions in the epoch
    "one": (8, 1, (7,)),
    "two": (8, 2, (6, 7)),
    "the epoch's last": (16, 1, (15,)),
    "the epoch's last two": (16, 2, (14, 15)),
    "the first after the snapshot": (4, 1, (3,)),
}


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("name", DROPPED)
def test_excluded_batches_are_as_if_never_there(name: str, validation: bool) -> None:
    # catches counters that miss the excluded batches: no end of the epoch, no validation, another learning rate
    at, count, missing = DROPPED[name]
    options: dict[str, Any] = {"validation": validation, "dropout": 0.0, "trainer": {"max_epochs": 1}}
    reference = Case(missing=missing, **options).fit()
    other = Case(**options).fit(GoBack(3, (at,), exclude=count))
    mine, theirs = state_of(*reference[:2]), state_of(*other[:2])
    del mine["rng"], theirs["rng"]
    assert_same(mine, theirs)
    assert other[0].averages == reference[0].averages
    assert other[0].validated[-2:] == reference[0].validated[-2:]
    final = {row[0]: row[2:] for row in other[0].rows}
    assert [final[row[0]] for row in reference[0].rows] == [row[2:] for row in reference[0].rows]


@pytest.mark.parametrize("before", [True, False])
def test_average_weights_are_restored_too(before: bool) -> None:
    # catches an average that keeps the weights of the steps that were undone (its own gate hides it in a plain replay)
    averaged = {}
    for missing, at in ((7,), ()), ((), (8,)):
        ema = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
        back = GoBack(3, at, exclude=1)
        case = Case(missing=missing, dropout=0.0, trainer={"max_epochs": 1})
        model, _, _ = case.fit(*((ema, back) if before else (back, ema)))  # its end: the average becomes the weights
        averaged[at] = [p.detach().clone() for p in model.parameters()]
    assert_same(*averaged.values())


def test_early_stopping_counts_each_validation_once() -> None:
    # catches a patience that is used up by validations which were undone
    stopping = EarlyStopping("val_loss", patience=3, min_delta=10.0)
    case = Case(validation=True, trainer={"max_epochs": 2, "val_check_interval": 4})
    _, trainer, _ = case.fit(GoBack(3, (9, 10)), stopping)
    assert trainer.global_step == 16, "validations at steps 4, 8, 12 and 16: none of the last three is better"


class Counting(GoBack):
    """A callback with state that only it knows."""

    def __init__(self, every: int, at: tuple[int, ...]) -> None:
        super().__init__(every, at)
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch_idx)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def snapshot_state(self) -> list[int]:
        return self.seen

    def restore_state(self, state: list[int]) -> None:
        self.seen = state


def test_own_state_of_a_callback() -> None:
    # catches a snapshot that holds the live object instead of a copy
    callback = Counting(3, (8, 11))
    Case(trainer={"max_epochs": 1}).fit(callback)
    assert callback.seen == list(range(16))


def test_tensors_stay_where_they_are() -> None:
    # catches a restore that gives parameters or optimizer state new storage, which DDP, FSDP and compiled code hold
    class Addresses(GoBack):
        found: ClassVar[set[tuple[int, ...]]] = set()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            state = trainer.optimizers[0].state
            tensors = [*pl_module.parameters(), *(each["exp_avg"] for each in state.values())]
            self.found.add(tuple(each.data_ptr() for each in tensors))

    callback = Addresses(3, (8, 20))
    Case().fit(callback)
    assert len(callback.found) == 1


def test_an_empty_snapshot_is_refused() -> None:
    # catches a restore of nothing that looks like a success
    with pytest.raises(SnapshotError, match="empty"):
        Snapshot().restore(None, None, "rollback")  # type: ignore[arg-type]


def test_parts_added_since_are_refused_before_anything_is_restored() -> None:
    # catches a restore that fails half way, when a callback adds layers during training
    class Adds(GoBack):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                pl_module.late = nn.BatchNorm1d(1)
            self.before = [each.detach().clone() for each in pl_module.parameters()]
            self.module = pl_module
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    callback = Adds(3, (8,))
    with pytest.raises(SnapshotError, match=r"parts of the run were added or removed since .* \(the model's buffers\)"):
        Case().fit(callback)
    assert all(map(torch.equal, callback.before, callback.module.parameters()))


def test_state_that_was_added_removed_or_replaced_is_restored() -> None:
    # catches optimizer state that came after the snapshot and stays, or that was lost and stays lost
    shared = torch.ones(2)
    live: dict[Any, Any] = {
        "a": shared,
        "b": shared,
        "c": [torch.zeros(1), 3],
        "d": (1, torch.ones(1)),
        "e": {"x": None},
    }
    flattener = Flattener()
    skeleton = flattener.flatten(live)
    assert len(flattener.tensors) == 3, "a tensor that is there twice is copied once"
    restorer = Restorer([each.clone() for each in flattener.tensors])
    shared.zero_()
    live["c"] = [torch.zeros(4)]
    live["d"] = None
    live["e"]["x"] = torch.ones(3)
    live["f"] = torch.ones(3)
    restorer.restore(skeleton, live)
    restorer.finish()
    assert live["a"] is shared
    assert live["a"].tolist() == [1.0, 1.0]
    assert live["c"][0].tolist() == [0.0]
    assert live["c"][1] == 3
    assert live["d"][1].tolist() == [1.0]
    assert live["e"] == {"x": None}
    assert "f" not in live


class Point(NamedTuple):
    x: Tensor
    y: int


CONTAINERS: dict[str, Any] = {
    "deque": deque([1, 2], maxlen=2),  # bug: restored without its length, it grows for ever
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "named tuple": Point(torch.tensor([math.nan, -0.0]), 1),
    "ordered dict": OrderedDict([("b", 1), ("a", 2)]),
    "default dict": defaultdict(list, a=[1]),
    "array": np.array([math.nan, 1.0]),
    "size": torch.Size([2, 3]),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("lost", [True, False])
def test_every_container_comes_back(name: str, lost: bool) -> None:
    # catches a kind of container that comes back as another, with other items, or without its maximal length
    live = {"x": copy.deepcopy(CONTAINERS[name])}
    flattener = Flattener()
    skeleton = flattener.flatten(live)
    restorer = Restorer([each.clone() for each in flattener.tensors])
    for each in flattener.tensors:
        each.fill_(7.0)
    if lost:
        live["x"] = None
    elif name == "deque":
        live["x"].append(3)
    elif name in ("ordered dict", "default dict"):
        live["x"].update(a=0, c=5)
    elif name == "set":
        live["x"].add(3)
    restorer.restore(skeleton, live)
    restorer.finish()
    assert not list(differences(live["x"], CONTAINERS[name]))


def test_tensors_that_died_are_not_taken_for_new_ones() -> None:
    # catches ids of dead tensors that are used again: of two plugins whose state_dict makes new tensors, the second's
    # state would be the first's
    flattener = Flattener()
    skeletons = [flattener.flatten({"x": torch.full((2,), float(i))}) for i in range(100)]
    restorer = Restorer(flattener.tensors)
    restored = [restorer.restore(each, None)["x"].tolist() for each in skeletons]
    assert restored == [[float(i)] * 2 for i in range(100)]


@pytest.mark.parametrize("shared", [True, False])
def test_a_wrapper_is_restored_through_its_inner_tensors(shared: bool) -> None:
    # catches inner tensors of one wrapper that are restored into another
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.tensor([math.nan, 1.0]), torch.tensor([-0.0, 2.0])
    live = {"x": TwoTensor(a, b), "y": TwoTensor(b if shared else b.clone(), a.clone()), "z": b}
    flattener = Flattener()
    skeleton = flattener.flatten(live)
    restorer = Restorer([each.clone() for each in flattener.tensors])
    expected = [each.clone() for each in (live["x"].a, live["x"].b, live["y"].a, live["y"].b, live["z"])]
    for each in flattener.tensors:
        each.zero_()
    assert restorer.restore(skeleton, live)["x"].a is a
    restorer.finish()
    found = [live["x"].a, live["x"].b, live["y"].a, live["y"].b, live["z"]]
    assert not list(differences(found, expected))


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors_are_restored_or_refused(layout: torch.layout) -> None:
    # catches a restore that writes into a detached copy of a sparse tensor, and changes nothing
    live = {"x": torch.tensor([[0.0, math.nan], [2.0, 0.0]]).to_sparse(layout=layout)}
    flattener = Flattener()
    skeleton = flattener.flatten(live)
    restorer = Restorer([each.clone() for each in flattener.tensors])
    same = live["x"]
    (same._values() if layout is torch.sparse_coo else same.values()).fill_(7.0)
    restorer.restore(skeleton, live)
    restorer.finish()
    assert live["x"] is same
    assert not list(differences(same.to_dense(), torch.tensor([[0.0, math.nan], [2.0, 0.0]])))
    live["x"] = torch.ones(2, 2).to_sparse(layout=layout)
    with pytest.raises(SnapshotError, match="no longer the tensor"):
        restorer.restore(skeleton, live)


def test_a_replaced_parameter_is_an_error() -> None:
    # catches a snapshot that silently does not restore a parameter
    flattener = Flattener()
    skeleton = flattener.flatten({"w": nn.Parameter(torch.ones(2))})
    with pytest.raises(SnapshotError, match=r"the model\[w\] is no longer the tensor"):
        Restorer(flattener.tensors).restore(skeleton, {"w": nn.Parameter(torch.ones(3))}, "the model")
