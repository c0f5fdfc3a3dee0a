"""The timeout of process groups."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from stabletrain import FSDP2Strategy, TensorParallelStrategy
from stabletrain.runtime.internals.process_groups import wait_at_most
from stabletrain.testing.trainer import quiet_trainer


def test_wait_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: half an hour's wait for a rank that never comes, in the groups of a device mesh, too; a strategy's own
    timeout is replaced; in a process that has built a run before, torch's default counts as one."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # another test of this process may have built a run
        if hasattr(dist.constants, name):
            monkeypatch.setattr(dist.distributed_c10d, name, getattr(dist.constants, name))
    undo_first = wait_at_most(quiet_trainer(strategy=DDPStrategy(process_group_backend="gloo"), devices=1), 60)
    own, before = timedelta(minutes=2), dist.distributed_c10d.default_pg_timeout
    for strategy, expected in (
        (DDPStrategy(process_group_backend="gloo"), timedelta(seconds=7)),
        (ModelParallelStrategy(1, 1, process_group_backend="gloo"), timedelta(seconds=7)),
        (DDPStrategy(process_group_backend="gloo", timeout=own), own),
        (FSDP2Strategy(process_group_backend="gloo"), timedelta(seconds=7)),
        (FSDP2Strategy(process_group_backend="gloo", timeout=own), own),
        (TensorParallelStrategy(process_group_backend="gloo"), timedelta(seconds=7)),
        (TensorParallelStrategy(process_group_backend="gloo", timeout=120), own),
        (SingleDeviceStrategy(), timedelta(seconds=7)),
    ):
        trainer = quiet_trainer(strategy=strategy, devices=1)
        undo = wait_at_most(trainer, 7)
        try:
            assert getattr(trainer.strategy, "_timeout", expected) == expected
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            group = dist.new_group([0])
            assert group._get_backend(torch.device("cpu")).options._timeout == expected
        finally:
            dist.destroy_process_group()
            undo()
    assert dist.distributed_c10d.default_pg_timeout == before == timedelta(seconds=60)
    undo_first()
    assert dist.distributed_c10d.default_pg_timeout == dist.constants.default_pg_timeout
