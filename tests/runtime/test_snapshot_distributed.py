"""Two ranks go back together: bit for bit where nothing is left out, with DDP, FSDP2 and ZeRO."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("going_back_on_two_ranks.py")


@pytest.mark.slow
def test_two_ranks_go_back_together(tmp_path: Path) -> None:
    """Bugs: a rank that waits for the other; a shard that is not put back; ranks that leave out different batches."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len((tmp_path / "passed.txt").read_text().splitlines()) == 11
