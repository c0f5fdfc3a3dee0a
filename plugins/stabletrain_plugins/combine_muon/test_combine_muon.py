"""Muon and AdamW as one optimizer: who trains what, equal to two optimizers, through checkpoints and copies."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from stabletrain import MuonAdamW, UserError


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden, self.output = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.norm, self.convolution = nn.LayerNorm(8), nn.Conv1d(1, 2, 3)
        if tied:
            self.output.weight = self.embedding.weight


def groups(net: Net) -> list[dict[str, Any]]:
    weights = [net.hidden.weight, net.convolution.weight]
    if net.output.weight is not net.embedding.weight:
        weights.append(net.output.weight)
    others = [net.hidden.bias, net.norm.weight, net.norm.bias, net.convolution.bias]
    return [
        {"params": [net.embedding.weight], "kind": "embedding", "weight_decay": 0.0},
        {"params": weights, "kind": "weight"},
        {"params": others, "kind": "bias", "weight_decay": 0.0},
    ]


def step(net: Net, *optimizers: Any, at: int = 0) -> None:
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(at))
    for each in optimizers:
        each.step()


def of_muon(optimizer: Any) -> set[nn.Parameter]:
    return {p for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}


def test_muon_has_the_hidden_matrices_only() -> None:
    """Bugs: the output layer, an embedding or a convolution is orthogonalized; a hidden matrix is not."""
    for tied in (False, True):
        net = Net(tied)
        assert of_muon(MuonAdamW(groups(net))) == {net.hidden.weight}
    net = Net()
    several = [{"params": [net.hidden.weight, net.output.weight], "kind": "weight"}]
    assert of_muon(MuonAdamW(several)) == {net.hidden.weight}  # no embedding: the last matrix
    layered: list[dict[str, Any]] = [{"params": [p], "kind": "weight"} for p in (net.output.weight, net.hidden.weight)]
    layered[1]["lr"] = 1e-4  # layer-wise rates: the group of the output layer is the first
    assert of_muon(MuonAdamW(layered)) == {net.hidden.weight}
    named = [{"params": [net.hidden.weight], "kind": "output"}, {"params": [net.output.weight], "kind": "weight"}]
    assert of_muon(MuonAdamW(named)) == {net.output.weight}
    chosen = [{"params": [net.hidden.weight, net.output.weight], "use_muon": True}]
    assert of_muon(MuonAdamW(chosen)) == {net.hidden.weight, net.output.weight}
    biases = [{"params": net.norm.parameters(), "kind": "norm"}]
    step(net, MuonAdamW(biases))  # nothing for Muon


@pytest.mark.parametrize(("positions", "tied"), [(8, True), (8, False), (32, True), (32, False)])
def test_a_hidden_matrix_of_the_shape_of_an_embedding_is_muons(positions: int, tied: bool) -> None:
    """Bug: as many positions are embedded as the network is wide, or its inner width, and every hidden matrix of that
    shape is taken for an output layer, without a word."""
    embeddings = [nn.Embedding(50, 8), nn.Embedding(positions, 8)]
    blocks = [nn.Linear(*shape, bias=False) for _ in range(2) for shape in ((8, 24), (8, 8), (8, 32), (32, 8))]
    head = [] if tied else [nn.Linear(8, 50, bias=False)]
    optimizer = MuonAdamW(
        [
            {"params": [each.weight for each in [*blocks, *head]], "kind": "weight"},
            {"params": [each.weight for each in embeddings], "kind": "embedding"},
        ]
    )
    assert of_muon(optimizer) == {each.weight for each in blocks}


def test_one_optimizer_equals_two() -> None:
    """Bugs: rates, decay or state of one part are those of the other; a changed rate reaches one part only."""
    net, other = Net(), Net()
    mine = MuonAdamW(groups(net), 0.01, betas=(0.8, 0.9))
    muon = torch.optim.Muon([other.hidden.weight], 0.01, adjust_lr_fn="match_rms_adamw")
    others = [p for p in other.parameters() if p is not other.hidden.weight]
    decays = [other.convolution.weight, other.output.weight]
    adamw = torch.optim.AdamW(
        [{"params": decays}, {"params": [p for p in others if not any(p is q for q in decays)], "weight_decay": 0.0}],
        0.01,
        betas=(0.8, 0.9),
        weight_decay=0.1,
    )
    for at in range(4):
        rate = 0.01 / (at + 1)
        for group in (*mine.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        step(net, mine, at=at)
        step(other, muon, adamw, at=at)
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_it_goes_on_after_a_checkpoint_and_as_a_copy(way: str) -> None:
    """Bug: after loading, the parts step with the state and the groups of before."""
    net = Net()
    mine = MuonAdamW(groups(net), 0.01)
    for at in range(3):
        step(net, mine, at=at)
    if way == "state_dict":
        other = copy.deepcopy(net)
        theirs = MuonAdamW(groups(other), 0.5)
        theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    elif way == "deepcopy":
        other, theirs = copy.deepcopy((net, mine))
    else:
        other, theirs = pickle.loads(pickle.dumps((net, mine)))
    for at in range(3, 6):
        step(net, mine, at=at)
        step(other, theirs, at=at)
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    assert len(theirs.state) == len(list(other.parameters()))


def test_groups_that_are_added_are_divided_too() -> None:
    """Bug: a group that is unfrozen during training goes to one part as a whole."""
    net, late = Net(), nn.Linear(4, 6)
    mine = MuonAdamW(groups(net), 0.01)
    step(net, mine)
    mine.add_param_group({"params": [late.weight, late.bias], "kind": "weight"})
    assert late.weight in of_muon(mine)
    assert late.bias not in of_muon(mine)
    before = [p.detach().clone() for p in late.parameters()]
    for p in late.parameters():
        p.grad = torch.ones_like(p)
    mine.step()
    assert not any(map(torch.equal, before, late.parameters()))


def test_bad_input_is_one_message() -> None:
    """Bug: a plain list of parameters, of which the embeddings would be orthogonalized."""
    net = Net()
    for given in (net.parameters(), [{"params": [net.hidden.weight]}]):
        with pytest.raises(UserError, match=r"expected parameter groups with a kind .*\"kind\": \"weight\""):
            MuonAdamW(given)
    for argument, value, expected in (
        ("momentum", 1.0, ">= 0 and < 1"),
        ("ns_steps", 0, "1 to 99"),
        ("ns_steps", 2.5, "1 to 99"),
        ("lr", math.nan, "a number >= 0"),
        ("lr", "fast", "a number >= 0"),
        ("weight_decay", -1, "a number >= 0"),
        ("betas", (0.9,), "two numbers"),
        ("betas", 0.9, "two numbers"),
        ("betas", (0.9, 1.5), "two numbers"),
        ("eps", -1, "a number > 0"),
    ):
        with pytest.raises(UserError, match=f"{argument} must be {expected}.*got "):
            MuonAdamW(groups(net), **{argument: value})
