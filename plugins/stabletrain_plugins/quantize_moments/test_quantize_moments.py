"""Which tensors have 8-bit state, and that optimizers of one process do not change each other's."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from state_bits import Small
from torch import Tensor, nn

from stabletrain import AdamW8bit, AdEMAMix8bit, Lion8bit, RMSprop8bit, SGD8bit, UserError

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def manager() -> Iterator[Any]:
    """The one of the process; it never forgets."""
    shared = bitsandbytes.optim.GlobalOptimManager.get_instance()
    before = [copy.copy(each) for each in (shared.pid2config, shared.index2config, shared.module_weight_config_triple)]
    yield shared
    shared.pid2config, shared.index2config, shared.module_weight_config_triple = before


def matrix(rows: int = 64, columns: int = 64) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))


def stepped(optimizer: Any, times: int = 1) -> Any:
    for i in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    return optimizer


def bits(optimizer: Any, p: Tensor) -> int:
    return 8 * int(optimizer.state[p]["state1"].element_size())


@pytest.mark.parametrize("make", [AdamW8bit, Lion8bit, RMSprop8bit, SGD8bit, AdEMAMix8bit])
def test_embeddings_have_32_bits_unless_asked(make: Any) -> None:
    """Bugs: the embedding of a plain module in 8 bits; the group's own key loses; the boundary of 4096 elements."""
    hidden, embedding, own, small = matrix(), matrix(), matrix(), nn.Parameter(torch.zeros(4095))
    groups = [
        {"params": [hidden, small], "kind": "weight"},
        {"params": [embedding], "kind": "embedding"},
        {"params": [own], "kind": "embedding", "optim_bits": 8},
    ]
    optimizer = stepped(make(copy.copy(groups)))
    assert [bits(optimizer, p) for p in (hidden, small, embedding, own)] == [8, 32, 32, 8]
    assert bits(stepped(make([{"params": [embedding], "kind": "embedding"}], embedding_bits=8)), embedding) == 8
    later = matrix()
    optimizer.add_param_group({"params": [later], "kind": "embedding"})
    assert bits(stepped(optimizer), later) == 32


def test_optimizers_of_one_process_do_not_change_each_other(manager: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: an exception for one model's first tensor makes that of every later model 32-bit, silently."""
    first, second = matrix(), matrix()
    manager.register_parameters([first])
    manager.override_config(first, "optim_bits", 32)
    manager.register_parameters([first])
    plain = stepped(bitsandbytes.optim.AdamW8bit([second], min_8bit_size=256))
    assert bits(plain, second) == 32, "bitsandbytes has changed: its exceptions do not leak any more"
    with caplog.at_level(logging.WARNING, "stabletrain"):
        optimizer = stepped(AdamW8bit([second]), 2)
    assert bits(optimizer, second) == 8
    (said,) = [record.getMessage() for record in caplog.records]
    assert "settings of another model" in said
    assert "(0, 0)" in said
    caplog.clear()
    assert bits(stepped(AdamW8bit([first])), first) == 32  # the user's own exception for this parameter
    embedding = bitsandbytes.nn.StableEmbedding(64, 64)
    optimizer = stepped(AdamW8bit([matrix(65), *embedding.parameters()]))
    assert bits(optimizer, embedding.weight) == 32
    assert not [key for key in manager.pid2config if key == id(embedding.weight)]  # nothing is left for the next one


def test_the_same_numbers_as_bitsandbytes() -> None:
    """Bug: a subclass that changes the update."""
    mine, theirs = matrix(), matrix()
    stepped(AdamW8bit([mine], 0.01), 5)
    stepped(bitsandbytes.optim.AdamW8bit([theirs], 0.01, (0.9, 0.95), weight_decay=0.1), 5)
    assert torch.equal(mine, theirs)


def test_bad_values_are_named() -> None:
    """Bug: 16 bits, which bitsandbytes takes for 8 or ignores."""
    with pytest.raises(UserError, match=r"embedding_bits must be 8 or 32, got 16"):
        AdamW8bit([matrix()], embedding_bits=16)  # type: ignore[arg-type]
    for make, betas in ((AdamW8bit, (0.9,)), (AdEMAMix8bit, (0.9, 0.99)), (AdamW8bit, 0.9)):
        with pytest.raises(UserError, match=r"betas must be [23] numbers, got"):
            make([matrix()], betas=betas)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"min_8bit_size must be >= 0 elements, got -1"):
        AdamW8bit([matrix()], min_8bit_size=-1)
    with pytest.raises(UserError, match=r"optim_bits of a parameter group: expected 8 or 32, got 4"):
        AdamW8bit([{"params": [matrix()], "optim_bits": 4}])


def test_a_32_bit_checkpoint_goes_on_in_8_bits() -> None:
    """Bugs: the state loads without an error and the step raises KeyError; moments are lost, or those of embeddings
    rounded; 8-bit state, saved and loaded, differs."""
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    module = Small()
    plain = torch.optim.AdamW(module.groups(), **options)  # type: ignore[arg-type]
    module.steps(plain, 0, 50)
    saved, weights = copy.deepcopy(plain.state_dict()), copy.deepcopy(module.state_dict())
    expected = module.steps(plain, 50, 1)

    def update(load: bool) -> tuple[float, float]:
        other = Small()
        other.load_state_dict(weights)
        optimizer = AdamW8bit(other.groups())
        if load:
            optimizer.load_state_dict(saved)
            embedding = optimizer.state[other.net[0].weight]
            assert torch.equal(embedding["state1"], saved["state"][0]["exp_avg"])
            assert optimizer.param_groups[0]["optim_bits"] == 32
        got = other.steps(optimizer, 50, 1)
        error = float((got - expected).norm() / expected.norm())
        return error, float(torch.dot(got, expected) / got.norm() / expected.norm())

    error, cosine = update(True)
    assert error <= 0.05
    assert cosine >= 0.999
    lost, _ = update(False)
    assert lost >= 0.6  # the bound would notice a state that is lost

    first, second = Small(), Small()
    mine, theirs = AdamW8bit(first.groups()), AdamW8bit(second.groups())
    first.steps(mine, 0, 5)
    second.load_state_dict(first.state_dict())
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert torch.equal(first.steps(mine, 5, 3), second.steps(theirs, 5, 3))


def test_a_checkpoint_of_another_algorithm_or_architecture_is_one_message() -> None:
    """Bug: a KeyError at the next step, which names neither the checkpoint nor the optimizer."""
    wide, module = nn.Linear(128, 64), nn.Linear(64, 64)
    adamw, sgd = torch.optim.AdamW(module.parameters()), torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    other = torch.optim.AdamW(wide.parameters())
    for each in (adamw, sgd, other):
        stepped(each)
    with pytest.raises(UserError, match=r"AdamW8bit: .* of AdamW.* exp_avg, exp_avg_sq\), got momentum_buffer of SGD"):
        AdamW8bit(module.parameters()).load_state_dict(sgd.state_dict())
    with pytest.raises(UserError, match=r"has the shape \(64, 128\), the parameter \(64, 64\).*another architecture"):
        AdamW8bit(module.parameters()).load_state_dict(other.state_dict())
    with pytest.raises(UserError, match=r"groups of \[2\] parameters, this one of \[1\]"):
        AdamW8bit([module.weight]).load_state_dict(adamw.state_dict())
    SGD8bit(module.parameters()).load_state_dict(sgd.state_dict())
