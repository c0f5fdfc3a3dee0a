"""Two real processes, one decision: faults on one rank only, every installed callback plugin in one run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stabletrain.config.discovery import plugins
from stabletrain.testing.checks.config import CALLBACKS

SCRIPT = """
import hashlib, json, math, os, sys
from pathlib import Path
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from stabletrain.config.discovery import plugins
from stabletrain.testing.subject import Subject
from stabletrain.testing.toy import ToyBatches, ToyModule, Watcher

torch.set_num_threads(1)
rank = int(os.environ["LOCAL_RANK"])
# rank 1 alone has the faults
faults = {20: math.nan, 70: 1e4, 71: 1e4, 80: math.inf} if rank == 1 else {}
callbacks = [Subject(plugins()[name]) for name in json.loads(sys.argv[1])]
kinds = [each.plugin.kind for each in callbacks]
callbacks = [each.build(each.plain_option()) for each in callbacks]
watcher = Watcher()
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False,
                  enable_progress_bar=False, enable_model_summary=False, max_steps=96, max_epochs=1,
                  callbacks=[*callbacks, watcher], use_distributed_sampler=False)
module = ToyModule()
trainer.fit(module, DataLoader(ToyBatches(0, faults), batch_size=None))
weights = b"".join(p.detach().numpy().tobytes() for p in module.parameters())
states = [each.state_dict() for each, kind in zip(callbacks, kinds) if kind != "callback"]
finite = all(bool(p.isfinite().all()) for p in module.parameters())
Path(f"rank{rank}.json").write_text(json.dumps({
    "outcomes": [list(each) for each in watcher.outcomes], "rates": watcher.rates, "finite": finite,
    "weights": hashlib.sha256(weights).hexdigest(), "states": repr(states),
}))
"""


@pytest.mark.slow
def test_both_ranks_decide_alike(tmp_path: Path) -> None:
    # catches a plugin that reads this rank's own loss or gradient, and a NaN that only its own rank skips
    # two plugins that set the windows are refused together, and the toy has no attention
    left_out = ("accumulate_fixed", "clip_qk")
    names = [n for n, plugin in plugins().items() if plugin.kind in CALLBACKS and n not in left_out]
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), json.dumps(names)],
            cwd=tmp_path,
            env={**shared, "LOCAL_RANK": str(rank), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=180)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(printed)
    first, second = ((tmp_path / f"rank{rank}.json").read_text() for rank in range(2))
    assert first == second
    seen = json.loads(first)
    skipped = [outcome[0] for outcome in seen["outcomes"] if outcome[5]]
    assert {20, 80} <= set(skipped)
    assert seen["finite"]


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
