"""Private parts of torch: tensors without memory, a process group without processes, and the memory trackers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stabletrain.runtime.internals import fake_world as fakes
from stabletrain.runtime.internals import memory_tracking
from stabletrain.runtime.internals.memory_tracking import StepTracker


def test_tensors_have_no_memory_and_the_group_has_its_size() -> None:
    """Bugs: a real tensor is made; a tied weight becomes two; the group or the mode stays."""
    before = nn.Module._apply
    with fakes.fake_world(1000):
        assert dist.get_world_size() == 1000
        module = nn.Sequential(nn.Linear(100_000, 100_000), nn.Linear(100_000, 100_000))  # 80 GB
        module[1].weight = module[0].weight
        module.to(torch.bfloat16)
        assert module[0].weight.dtype == torch.bfloat16
        assert module[0].weight is module[1].weight
        assert fakes.is_plain(module[0].weight)
        assert fakes.is_fake(module[0].weight)
        with pytest.raises(Exception, match="local_scalar_dense") as raised:
            module[0].weight.sum().item()
        assert fakes.needs_values(raised.value)
        assert fakes.with_values(lambda: torch.ones(3).sum().item())() == 3.0
        with pytest.raises(RuntimeError, match="process group already"), fakes.fake_world(2):
            pass
    assert nn.Module._apply is before
    assert not dist.is_initialized()


def test_the_tracker_counts_parameters_activations_and_state() -> None:
    """Bug: a torch without these trackers, or with other categories, gives a wrong plan instead of none."""
    module = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.Adam(module.parameters())
    x = torch.ones(2, 8)
    module(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with StepTracker(module, [optimizer], [x]) as tracker:
        for _ in range(2):  # a second forward is not another step
            module(x).sum().backward()
        tracker.update_begins()
        optimizer.step()
    assert tracker.peak.parts["parameters"] == 8 * 4 * 4
    assert tracker.peak.parts["gradients"] == 8 * 4 * 4
    assert tracker.peak.parts["batch, buckets, averages"] == 2 * 8 * 4
    assert tracker.peak.parts["optimizer state, temporary tensors"] >= 2 * 8 * 4 * 4
    assert tracker.peak.where == "optimizer step"
    assert tracker.peak.total == sum(tracker.peak.parts.values())


def test_a_missing_tracker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an AttributeError from within torch, in place of what is missing."""

    class Other(TorchDispatchMode):
        pass

    monkeypatch.setattr("torch.distributed._tools.mem_tracker.MemTracker", Other)
    with pytest.raises(fakes.NotTraceable, match="no memory tracker"):
        memory_tracking.StepTracker(nn.Linear(1, 1), [], [])
