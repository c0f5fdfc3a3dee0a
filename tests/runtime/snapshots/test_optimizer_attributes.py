"""Attributes of optimizers in a snapshot: what is put back, what keeps its identity, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fits import HEALTHY, Net, batches, fit
from torch import nn
from torch.optim import SGD, Optimizer

from stabletrain import Rollback, UserError
from stabletrain.runtime.snapshots.optimizer_attributes import OptimizerAttributes, copied
from stabletrain.runtime.snapshots.state_tree import Flattener, Restorer, SnapshotError


class Helper:
    def __init__(self) -> None:
        self.count = 0


class Own(SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, 0.1)
        self.helper, self.random = Helper(), np.random.default_rng(0)
        self.first = self.second = torch.ones(2)
        self.third, self.fourth = torch.zeros(2), torch.full((2,), torch.nan)
        self.generator = torch.Generator().manual_seed(0)


def test_attributes_are_put_back_in_place() -> None:
    # catches objects that are replaced by copies, tensors that share memory afterwards or no longer do, attributes that
    # came since, and random generators
    optimizer = Own([nn.Parameter(torch.ones(1))])
    helper, first, drawn = optimizer.helper, optimizer.first, optimizer.generator.get_state()
    flattener = Flattener(copied)
    snapshot = OptimizerAttributes([optimizer], nn.Module(), flattener)
    tensors = [each.clone() for each in flattener.tensors]
    for _ in range(2):  # a snapshot can be restored again
        optimizer.helper.count += 3
        optimizer.helper = Helper()  # replaced, as SPAM does
        optimizer.helper.count = 9
        optimizer.second = torch.full((2,), 5.0)
        optimizer.fourth = optimizer.third
        optimizer.late = [1, torch.ones(1)]  # type: ignore[attr-defined]
        expected = np.random.default_rng(0).random()
        optimizer.random.random()
        torch.rand(1, generator=optimizer.generator)
        first.zero_()
        restorer = Restorer(tensors)
        snapshot.restore(restorer)
        restorer.finish()
        assert optimizer.helper is helper
        assert helper.count == 0
        assert optimizer.first is optimizer.second is first
        assert torch.equal(first, torch.ones(2))
        assert torch.equal(optimizer.third, torch.zeros(2))
        assert optimizer.fourth.isnan().all()
        assert not hasattr(optimizer, "late")
        assert optimizer.random.random() == expected
        assert torch.equal(optimizer.generator.get_state(), drawn)


class Reading(SGD):
    """Reads its rates from an iterator, of which no copy can be made."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, 0.1)
        self.schedule = {"rates": (0.1 for _ in range(100))}


class Reader(Net):
    def configure_optimizers(self) -> Optimizer:
        return Reading(self.parameters())


def test_what_cannot_be_copied_is_refused_at_the_start() -> None:
    # catches a rollback that leaves an iterator where it is, or fails when it is needed
    with pytest.raises(UserError, match=r"rollback: Reading.schedule\['rates'\] is a generator") as error:
        fit(Reader(), batches(HEALTHY, HEALTHY), Rollback())
    assert "train without rollback" in str(error.value)
    with pytest.raises(SnapshotError, match="generator"):
        Flattener(copied).flatten({"a": (0 for _ in range(3))})
