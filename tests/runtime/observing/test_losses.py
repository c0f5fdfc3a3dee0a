"""Calls of loss functions are seen, with their arguments, and change nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stabletrain.runtime.observing.losses import LossCall, LossCalls

X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def test_every_way_to_call_cross_entropy_is_seen_once() -> None:
    """Bugs: only the function is seen, or only the module; one call is counted again as the nll_loss inside it."""
    calls: list[LossCall] = []
    with LossCalls(calls.append):
        F.cross_entropy(X, Y)
        F.cross_entropy(target=Y, input=X, reduction="sum", ignore_index=2)
        nn.CrossEntropyLoss(label_smoothing=0.1)(X, Y)
        nn.NLLLoss()(X.log_softmax(-1), Y)
        F.mse_loss(X, X, reduction="none")
    assert [each.name for each in calls] == ["cross_entropy"] * 3 + ["nll_loss", "mse_loss"]
    assert [each.reduction for each in calls] == ["mean", "sum", "mean", "mean", "none"]
    assert calls[1].arguments["ignore_index"] == 2
    assert calls[2].arguments["label_smoothing"] == 0.1
    assert all(torch.equal(each.input, X) and torch.equal(each.target, Y) for each in calls[:3])
    value = calls[1].value
    assert value is not None
    assert torch.equal(value, F.cross_entropy(X, Y, reduction="sum", ignore_index=2))


def test_loss_and_gradient_are_those_without_it() -> None:
    """Bug: the call is made a second time, or on a detached input."""
    found = []
    for watched in (False, True):
        x = X.clone().requires_grad_()
        mode = LossCalls(lambda call: None)
        if watched:
            mode.__enter__()
        loss = F.binary_cross_entropy_with_logits(x, (X > 0).float())
        if watched:
            mode.__exit__(None, None, None)
        loss.backward()
        assert x.grad is not None
        found.append((loss.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_call_that_raises_is_seen_and_nothing_stays_open() -> None:
    """Bugs: targets out of range, which are what one wants to see, are never seen; a mode that outlives the error."""
    calls: list[LossCall] = []
    with pytest.raises(IndexError, match="out of bounds"), LossCalls(calls.append):
        F.cross_entropy(X, Y + 1)
    assert calls[0].target.max() == 3
    assert calls[0].value is None
    F.cross_entropy(X, Y)
    assert len(calls) == 1


def test_older_arguments_for_the_reduction_are_understood() -> None:
    """Bug: a sum that is asked for by ``size_average=False`` is taken for a mean."""
    calls: list[LossCall] = []
    for arguments in ({"size_average": False}, {"reduce": False}):
        with LossCalls(calls.append), pytest.warns(UserWarning, match="deprecated"):
            F.mse_loss(X, X, **arguments)
    assert [each.reduction for each in calls] == ["sum", "none"]


def test_input_and_target_that_are_swapped() -> None:
    """Bug: the output of a model is taken for the target, as losses of differences are often called the other way."""
    calls: list[LossCall] = []
    output, target = torch.ones(3, requires_grad=True), torch.zeros(3)
    with LossCalls(calls.append):
        loss = F.mse_loss(target, output)
        F.mse_loss(output, target)
        F.mse_loss(target, target + 1)
    assert [call.input.tolist() for call in calls] == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
    assert float(loss.detach()) == 1.0
