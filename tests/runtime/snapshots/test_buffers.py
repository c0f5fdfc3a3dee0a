"""Copies in memory: exact for every layout, in place, and without new memory the second time."""

import pytest
import torch

from stabletrain.runtime.snapshots.buffers import SnapshotBuffers, bytes_of
from stabletrain.runtime.snapshots.tensor_kinds import plain_tensors
from stabletrain.testing.checks.equality import same

LAYOUTS = {
    "bf16": torch.randn(5).bfloat16(),
    "fp16": torch.randn(5).half(),
    "int8": torch.arange(-3, 3, dtype=torch.int8),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "complex": torch.randn(3, dtype=torch.complex64),
    "0-d": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(3, 4).t(),
    "strided": torch.randn(8)[::2],
    "expanded": torch.randn(1, 3).expand(4, 3),
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_copy_is_exact(name: str) -> None:
    """Bug: a dtype or layout whose copy has other bits, or shape."""
    source = LAYOUTS[name]
    snapshot = SnapshotBuffers()
    snapshot.copy_in([source])
    assert same(snapshot.tensors[0], source)


def test_copying_back_is_in_place_and_undoes_a_change() -> None:
    """A restore that made new tensors would leave the optimizer with the old ones."""
    tensors = [each.clone() for name, each in LAYOUTS.items() if name != "expanded"]
    before, addresses = [each.clone() for each in tensors], [each.data_ptr() for each in tensors]
    snapshot = SnapshotBuffers()
    snapshot.copy_in(tensors)
    for each in tensors:
        each.zero_()
    snapshot.copy_back(tensors)
    assert all(same(now, then) for now, then in zip(tensors, before, strict=True))
    assert [each.data_ptr() for each in tensors] == addresses


def test_buffers_are_used_again_also_when_the_list_changes() -> None:
    """Fresh memory costs page faults at every snapshot: 3 to 60 times the copy."""
    a, b, c = torch.randn(4), torch.randn(5), torch.randn(6)
    snapshot = SnapshotBuffers()
    snapshot.copy_in([a, b])
    addresses = {each.data_ptr() for each in snapshot.tensors}
    snapshot.copy_in([b, c, a])
    assert {snapshot.tensors[0].data_ptr(), snapshot.tensors[2].data_ptr()} == addresses
    assert [each.tolist() for each in snapshot.tensors] == [b.tolist(), c.tolist(), a.tolist()]
    assert snapshot.nbytes == bytes_of([a, b, c])
    snapshot.clear()
    assert snapshot.nbytes == 0


def test_a_wrong_layout_is_refused_and_changes_nothing() -> None:
    """Bug: copying back into other shapes changes some tensors before it fails."""
    snapshot = SnapshotBuffers()
    snapshot.copy_in([torch.ones(3)])
    target = torch.zeros(4)
    with pytest.raises(ValueError, match="1 tensors"):
        snapshot.copy_back([target])
    assert target.tolist() == [0, 0, 0, 0]


def test_parameters_that_need_gradients_are_copied_outside_of_autograd() -> None:
    """Bug: an in-place change of a leaf that requires a gradient raises, or enters the graph."""
    parameter = torch.nn.Parameter(torch.ones(3))
    snapshot = SnapshotBuffers()
    snapshot.copy_in([parameter])
    with torch.no_grad():
        parameter.add_(1)
    snapshot.copy_back([parameter])
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_a_wrapper_gives_its_inner_tensors() -> None:
    """8-bit optimizers of torchao keep their state in tensor subclasses."""
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.ones(2), torch.zeros(2)
    assert [each.data_ptr() for each in plain_tensors([TwoTensor(a, b)])] == [a.data_ptr(), b.data_ptr()]


def test_an_empty_list() -> None:
    """Bug: a call of torch's foreach functions without tensors, which raises."""
    snapshot = SnapshotBuffers()
    snapshot.copy_in([])
    snapshot.copy_back([])
    assert snapshot.tensors == []


def test_a_large_copy_is_shared_by_threads_and_exact() -> None:
    """Above the size from which threads help: a tensor that no thread copied, or one copied into another's buffer."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in (6_000_000, 1, 4_000_000, 999, 3_000_000, 10)]
    before = [each.clone() for each in tensors]
    snapshot = SnapshotBuffers()
    snapshot.copy_in(tensors)
    for each in tensors:
        each.zero_()
    snapshot.copy_back(tensors)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
