"""What torch keeps in private attributes of DistributedDataParallel about its buckets."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from stabletrain.runtime.internals import ddp_buckets

LAYERS = [["2.bias", "2.weight"], ["0.bias", "0.weight"], ["1.bias", "1.weight"]]
"""Each layer in a bucket of its own; not in the order in which their gradients come."""


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _module() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(24, 24) for _ in range(3)))


def _wrapped(strategy: Any, wanted: Any, module: nn.Module) -> tuple[DistributedDataParallel, list[str]]:
    done: list[str] = []
    trainer: Any = SimpleNamespace(strategy=strategy)
    undo = ddp_buckets.around_wrapping(trainer, lambda: wanted, done.append)
    model = strategy._setup_model(module)
    undo()
    return model, done


def _strategy(**options: Any) -> DDPStrategy:
    return DDPStrategy(parallel_devices=[torch.device("cpu")], bucket_cap_mb=0.002, **options)


def test_buckets_are_told_without_memory_for_them() -> None:
    """Bugs: initial buckets taken for those that DDP will use; a gradient's memory taken at each checkpoint; gradients
    changed by asking; an error after a parameter was replaced; names of another torch."""
    assert ddp_buckets.is_supported()
    assert ddp_buckets.buckets_of(nn.Linear(2, 2), may_lay_out=True) is None
    model, _ = _wrapped(_strategy(), None, _module())
    assert ddp_buckets.buckets_of(model, may_lay_out=True) is None
    model(torch.ones(2, 24)).sum().backward()
    assert ddp_buckets.buckets_of(model, may_lay_out=False) is None
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    calls = _Calls()
    with calls:
        found = ddp_buckets.buckets_of(model, may_lay_out=False), ddp_buckets.buckets_of(model, may_lay_out=True)
    assert found == (None, [[f"{i}.bias", f"{i}.weight"] for i in (2, 1, 0)])
    assert torch.ops.aten.zeros_like.default not in calls.seen
    assert torch.ops.aten.new_empty.default in calls.seen
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True) if p.grad is not None)
    model(torch.ones(2, 24))
    assert ddp_buckets.buckets_of(model, may_lay_out=False) == found[1]
    assert not model.reducer._rebuild_buckets()
    model.module[0].weight = nn.Parameter(torch.ones(24, 24))
    assert ddp_buckets.buckets_of(model, may_lay_out=False) is None


def test_a_model_is_wrapped_with_given_buckets_and_keeps_them() -> None:
    """Bugs: DDP chooses others after the first step, or the order in which it registers parameters remains changed."""
    build = DistributedDataParallel._build_params_for_reducer
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        model, done = _wrapped(_strategy(**options), LAYERS, _module())
        assert done == [""]
        for _ in range(4):
            assert ddp_buckets.buckets_of(model, may_lay_out=False) == LAYERS
            model(torch.ones(2, 24)).sum().backward()
        assert DistributedDataParallel._build_params_for_reducer is build
        plain, done = _wrapped(_strategy(**options), None, _module())
        assert done == []
        assert plain._has_rebuilt_buckets is False


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: buckets that are not those of the checkpoint are used without a word; an error with another torch; an
    unknown or missing name raises in DDP's constructor, or a name that comes twice is sent twice."""
    for wrong in ([*LAYERS, ["3.bias"]], LAYERS[:2], [*LAYERS, ["0.bias"]], []):
        model, done = _wrapped(_strategy(), wrong, _module())
        assert done == ["other parameters are trained than at the checkpoint"]
        model(torch.ones(2, 24)).sum().backward()
    model, done = _wrapped(_strategy(find_unused_parameters=True), LAYERS, _module())
    assert done == ["find_unused_parameters=True keeps the initial ones"]
    model, done = _wrapped(_strategy(), [[name for each in LAYERS for name in each]], _module())
    assert done == ["buckets have other sizes than at the checkpoint (bucket_cap_mb)"]
    monkeypatch.delattr(DistributedDataParallel, "_build_params_for_reducer")
    assert ddp_buckets.buckets_of(model, may_lay_out=False) is None
    assert not ddp_buckets.is_supported()
    assert ddp_buckets._problem(model, {}) == f"torch {torch.__version__} lacks the functions for it"
    other: Any = SimpleNamespace(strategy=SingleDeviceStrategy("cpu"))
    ddp_buckets.around_wrapping(other, lambda: LAYERS, lambda problem: None)()
    assert not other.strategy.__dict__.get("_setup_model")
