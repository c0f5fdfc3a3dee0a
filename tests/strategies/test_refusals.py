"""What FSDP2 cannot train is refused before the first step, with the reason and a way out."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import sharded_modules as modules
import torch
from rank_pool import on_ranks
from sharded_on_ranks import Case, ends, refused_by_trainers

from stabletrain import UserError
from stabletrain.strategies.fsdp2 import FSDP2Strategy
from stabletrain.strategies.refusals import check_compiler
from stabletrain.strategies.sharding import plan


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("Lazy", {}, "net.1.weight has no shape yet, .* lazy module. Run one batch"),
        ("Complex", {}, "phase is complex .*strategy=ddp"),
        ("Subclassed", {}, "own is a OwnParameter"),
        ("MixedTypes", {}, r"embedding.weight \(torch.float32\), head.weight \(torch.bfloat16\)"),
        ("Listed", {}, "the attribute mine of Listed keeps the parameter head.weight"),
        ("Encoder", {"also": ["generate"]}, "has no method 'generate'"),
        ("Blocks", {"also": ["forward"]}, "besides forward"),
        ("Convolutions", {"checkpoint_units": True, "compile_units": True}, "has the buffer 1.running_mean"),
        ("Blocks", {"checkpoint_units": True, "compile_units": True}, None),
        ("Recurrent", {}, None),
        ("LoRA", {}, None),
    ],
)
def test_modules(module: str, arguments: dict[str, Any], says: str | None) -> None:
    """Bugs: an error deep in torch after the processes have started; a parameter that is never trained; a refusal of
    LSTMs, which keep their weights in a list, or of frozen parameters of another dtype."""
    made, options = getattr(modules, module)(), FSDP2Strategy(**arguments).options
    if says is None:
        plan(made, options)
        return
    with pytest.raises(UserError, match=says):
        plan(made, options)


def test_a_compiler_is_needed_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: torch.compile's own error in the first step, or a refusal of backends that compile nothing."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    cpu = torch.device("cpu")
    for backend in (True, "inductor"):
        with pytest.raises(UserError, match=r"g\+\+ and clang\+\+ are not found.*compile_units=False"):
            check_compiler(cpu, backend)
        check_compiler(torch.device("cuda", 0), backend)
    check_compiler(cpu, "aot_eager")
    check_compiler(cpu, False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    check_compiler(cpu, True)


def test_what_only_a_run_shows(tmp_path: Path) -> None:
    """Bugs: an optimizer whose parameters are no longer the module's trains nothing; "got mixed torch.Tensor and
    DTensor" names no module; a callback fails in a copy of the module; a strategy's mesh is another Trainer's."""
    says = {
        "EarlyOptimizer": "AdamW was made before the module was sharded: its embedding.weight",
        "ShardsItself": "shards itself: encoder.layers.0",
        "Penalty": "a parameter of the unit encoder.layers.2 (TransformerEncoderLayer), was used outside",
        "OtherMethod": "encoder.layers.0.linear1.weight, a parameter of the unit encoder.layers.0",
    }
    found = on_ranks(ends, 2, tmp_path, [Case(name, {}, (("max_steps", 1),)) for name in says])
    for rank in found:
        for end, text in zip(rank, says.values(), strict=True):
            assert end.error.startswith("UserError: fsdp2: ")
            assert text in end.error


def test_trainers(tmp_path: Path) -> None:
    """Bugs: a copy of the module fails in the middle; a second Trainer takes the first one's mesh; bf16 weights meet
    fp32 inputs; two optimizers get each other's gradients."""
    (texts,) = on_ranks(refused_by_trainers, 1, tmp_path)
    expected = {
        "ema": "EMAWeightAveraging copies the whole module",
        "swa": "StochasticWeightAveraging copies the whole module",
        "gather": "gather='bf16' needs autocast to bf16",
        "replicate": "replicate must divide the number of processes, got 2 for 1",
        "two optimizers": "steps 2 optimizers by hand",
        "second": "belongs to another Trainer already",
    }
    assert texts.keys() == expected.keys()
    for name, text in expected.items():
        assert text in texts[name], name
