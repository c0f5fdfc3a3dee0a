"""Private attributes of Lightning's strategies and of FSDP2."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded_internals
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from rank_pool import on_ranks
from torch import nn

from stabletrain.runtime.internals import sharding


def test_the_size_of_the_mesh() -> None:
    """Bug: Lightning reads another attribute, and the mesh has one process for each node."""
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    assert strategy._data_parallel_size == "auto"
    sharding.set_data_parallel_size(strategy, 4)
    assert strategy._data_parallel_size == 4


@pytest.mark.slow  # their quick use is that of the strategy's own tests
def test_on_one_rank(tmp_path: Path) -> None:
    """Bugs: gradients that were not reduced outlive a step; a broadcast that changes a type."""
    on_ranks(sharded_internals.private, 1, tmp_path)


def test_a_scaler_is_changed_for_a_time_only() -> None:
    """Bug: an overflow in plain gradients is lost, or the scaler stays changed."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.1)
    undo = sharding.unscale_apart(scaler)
    scaler.scale(torch.zeros(()))
    parameter.grad = torch.tensor([8.0, 4.0])
    scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [2.0, 1.0]
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    assert [float(each) for each in found.values()] == [0.0]
    for value in (torch.nan, torch.inf):
        parameter.grad = torch.tensor([value, 4.0])
        other = torch.amp.GradScaler("cpu", init_scale=4.0)
        sharding.unscale_apart(other)
        other.scale(torch.zeros(()))
        other.unscale_(optimizer)
        found = other._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        assert [float(each) for each in found.values()] == [1.0]
    undo()
    assert "_unscale_grads_" not in vars(scaler)


def test_a_module_that_is_not_sharded_has_nothing_to_forget() -> None:
    """Bug: an AttributeError for modules of another kind."""
    sharding.forget_unreduced_gradients(nn.Sequential(nn.Linear(2, 2)))
    sharding.broadcast_coalesced([])
    called = SimpleNamespace(lightning_module=object())
    called._forward_redirection = lambda *arguments: arguments
    found = sharding.call_through_root(called, "training_step", 1)  # type: ignore[arg-type]
    assert found == (called.lightning_module, called.lightning_module, "training_step", 1)
