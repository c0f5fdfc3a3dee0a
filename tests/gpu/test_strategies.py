"""DistributedDataParallel and FSDP2 in one process, with NCCL on CUDA: train, drop, go back, resume."""

from pathlib import Path

import pytest
from places import Place
from rank_pool import on_ranks
from ranks_on_device import train


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_one_process(place: Place, name: str, tmp_path: Path) -> None:
    """Bugs: a collective that waits for the device or is not made; shards that a step, a drop or a restore misses."""
    (found,) = on_ranks(train, 1, tmp_path, name, place)
    assert found == []
