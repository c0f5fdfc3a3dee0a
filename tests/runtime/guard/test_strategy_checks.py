"""Strategies that the guard does not support, or Lightning uses only in part, are refused with what works instead."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fits import Net, trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from stabletrain import UserError
from stabletrain.runtime.guard.strategy_checks import check_accumulation, check_strategy

SCRIPT = Path(__file__).parents[2] / "helpers" / "start_ranks.py"


class Synchronised(Net):
    def __init__(self) -> None:
        super().__init__(norm=False)
        self.norm = nn.SyncBatchNorm(3)


def on_two_cpus(**options: Any) -> Any:
    return trainer(devices=2, **{"strategy": DDPStrategy(), **options})


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (
            Net,
            {"strategy": DDPStrategy(ddp_comm_hook=fp16_compress_hook)},
            ["fp16_compress_hook", "ignores", "on GPUs"],
        ),
        (Net, {"sync_batchnorm": True}, ["net.1", "GPUs only", "trainer.sync_batchnorm=false"]),
        (Synchronised, {}, ["norm would be a SyncBatchNorm", "GroupNorm"]),
    ],
)
def test_what_the_cpu_cannot_do(make: Any, options: dict[str, Any], words: list[str]) -> None:
    """Bugs: a compression that is not applied, without a word; an error of torch's in the first forward."""
    mine = on_two_cpus(**options)
    with pytest.raises(UserError) as refused:
        check_strategy(mine, make(), "ClipNorm")
    assert all(word in str(refused.value) for word in words), refused.value
    check_strategy(on_two_cpus(), Net(), "ClipNorm")
    check_strategy(on_two_cpus(sync_batchnorm=True), Net(norm=False), "ClipNorm")
    if not make().net[1].__class__.__name__.startswith("Batch"):
        check_strategy(trainer(accelerator="cpu", devices=1), make(), "ClipNorm")


def test_the_first_fsdp() -> None:
    """Bug: each rank decides on the norm of its own shard."""
    mine: Any = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(UserError, match=r"ClipNorm: FSDPStrategy is the first version of FSDP.*Use FSDP2"):
        check_strategy(mine, Net(), "ClipNorm")


def test_a_static_graph_does_not_accumulate() -> None:
    """Bug: an internal assertion of torch's in the second batch."""
    with pytest.raises(UserError, match=r"static_graph=True.*windows of 3 micro-batches.*Use strategy=ddp"):
        check_accumulation(on_two_cpus(strategy=DDPStrategy(static_graph=True), accumulate_grad_batches=3))
    check_accumulation(on_two_cpus(strategy=DDPStrategy(static_graph=True)))
    check_accumulation(on_two_cpus(accumulate_grad_batches=3))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_ranks_that_lightning_starts(strategy: str, tmp_path: Path) -> None:
    """Bugs: a run that trains to its end, and then dies because Lightning sets ``best_model_path``; a plugin that
    cannot be pickled."""
    folders = [str(SCRIPT.parent), str(SCRIPT.parents[2]), str(SCRIPT.parents[2] / "plugins")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path), strategy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert Path(result["best"]).is_dir()
    assert result["best"] == result["last"]
    assert result["skipped"] == 1
    assert result["finite"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_cuda_graphs_do_not_accumulate() -> None:
    """Bug: torch's error in the second backward pass, which says nothing of accumulation."""
    net = Net()
    net.net.compile(mode="reduce-overhead")
    for size in (1, 4):
        mine = trainer(accumulate_grad_batches=size)
        check_strategy(mine, net, "ClipNorm")  # a CPU has no CUDA graphs
        mine.strategy.accelerator = CUDAAccelerator()
        with pytest.raises(UserError, match=r"reduce-overhead.* windows of 4 ") if size > 1 else nullcontext():
            check_strategy(mine, net, "ClipNorm")
