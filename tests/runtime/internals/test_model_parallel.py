"""Private parts of torch and Lightning that the strategies use are what they are taken for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from rank_pool import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stabletrain.runtime.internals import model_parallel
from stabletrain.runtime.internals.packages import ModelParallelStrategy as OfBoth
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.internals.stacked_pieces import for_checkpoint, pieces_of
from stabletrain.runtime.internals.trainer import supports_device_decisions


def stacked(folder: Path) -> None:
    """Asserts on each of two ranks."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    whole = torch.arange(3 * 4 * 5.0).view(12, 5)
    tensor = distribute_tensor(whole, mesh, [model_parallel.stacked_shard(0, 3)], src_data_rank=None)
    assert model_parallel.stacked_in(tensor.placements[0]) == 3
    assert torch.equal(tensor.to_local(), whole.view(3, 2, 2, 5)[:, rank].flatten(0, 1))
    assert torch.equal(tensor.full_tensor(), whole)
    pieces = pieces_of(tensor)
    assert pieces is not None
    assert len(pieces) == 3
    for offset, piece in pieces.items():
        assert torch.equal(piece, whole[offset[0] : offset[0] + 2])
        assert piece.untyped_storage().data_ptr() == tensor.to_local().untyped_storage().data_ptr()
    plain = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    assert pieces_of(plain) is None
    assert for_checkpoint({"a": [plain, 1]})["a"] == [plain, 1]
    made = for_checkpoint([{"x": tensor}])[0]["x"]
    assert made.size() == whole.shape
    assert made.size(1) == 5


def test_a_stacked_tensor_is_cut_in_each_of_its_matrices(tmp_path: Path) -> None:
    """Bugs: torch's private placement has another meaning; pieces with wrong offsets, or copies of them."""
    on_ranks(stacked, 2, tmp_path)


def test_the_sizes_of_the_mesh_and_the_sampler_can_be_set() -> None:
    """Bug: Lightning has renamed an attribute, and the setting is lost without an error."""
    strategy = ModelParallelStrategy()
    assert {"_data_parallel_size", "_tensor_parallel_size"} <= set(vars(strategy))
    model_parallel.set_mesh_sizes(strategy, 3, 2)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (3, 2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert trainer._accelerator_connector.use_distributed_sampler is True
    model_parallel.use_own_sampler(trainer)
    assert trainer._accelerator_connector.use_distributed_sampler is False


def test_a_fused_optimizer_becomes_one_that_is_not() -> None:
    """Bug: torch's name for "takes grad_scale" has changed, and a loss scaler gives it to an optimizer without it."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    assert supports_device_decisions(optimizer)
    model_parallel.refuse_device_decisions(optimizer)
    assert not supports_device_decisions(optimizer)


def test_modules_on_the_meta_device_are_initialised() -> None:
    """Bug: parameters of uninitialised memory."""
    with torch.device("meta"):
        layer = nn.LayerNorm(3)
    model_parallel.materialize(layer, torch.device("cpu"))
    assert torch.equal(layer.weight, torch.ones(3))


def test_sharded_checkpoints_are_recognised(tmp_path: Path) -> None:
    """Bug: the name of Lightning's file has changed."""
    assert not model_parallel.is_sharded_checkpoint(tmp_path)
    (tmp_path / "meta.pt").touch()
    assert model_parallel.is_sharded_checkpoint(tmp_path)


@pytest.mark.parametrize("package", range(2))
def test_the_strategy_is_one_of_both_packages(package: int) -> None:
    """Bug: the Trainer of the other package refuses the object."""
    kinds = both(ModelParallelStrategy)
    assert len(kinds) == 2
    assert isinstance(OfBoth(), kinds[package])
