"""On two ranks DDP and FSDP2 train what one process trains, also with empty shards and a NaN on one rank only."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
]
SCRIPT = Path(__file__).with_name("transforms_on_two_ranks.py")


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two ranks have saved; the script also checks the norms of every kind of shard."""
    folder = tmp_path_factory.mktemp("two_ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["value", "unitwise", "tensorwise"])
def test_two_ranks_train_what_one_process_trains(folder: Path, name: str, strategy: str, tmp_path: Path) -> None:
    """Bugs: norms of shards instead of tensors, a rank with an empty shard that hangs, ranks that decide apart."""
    ranks = [torch.load(folder / f"{strategy}-{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = loaded().train(name, tmp_path)
    for key, expected in alone.items():
        assert torch.equal(ranks[0][key], ranks[1][key]), key
        torch.testing.assert_close(
            ranks[0][key], expected, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
