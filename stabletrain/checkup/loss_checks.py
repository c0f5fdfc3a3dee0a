"""Checks of the loss, read at the calls of loss functions in the first steps; a loss computed by hand is not seen."""

from __future__ import annotations

import math

import torch

from stabletrain.checkup.answer import Answer, finding, fine, not_applicable
from stabletrain.checkup.case import Case
from stabletrain.checkup.prior import plain_loss
from stabletrain.runtime.observing.losses import LossCall

START_FACTOR, START_MORE = 1.5, 0.3
SUM_TO_ONE, FEWEST_VALUES = 1e-3, 64
SHARE_OF_LOSS = 0.5
_DIFFERENCES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
_UNSEEN = "no call of a loss function was seen"


def loss_at_start(case: Case) -> Answer:
    """The first loss against that of a uniform guess."""
    calls = _calls(case)
    if isinstance(calls, Answer):
        return calls
    call = calls[0]
    loss = plain_loss(call)
    if call.name in ("cross_entropy", "nll_loss") and call.input.ndim:
        classes = call.input.shape[1 if call.input.ndim > 1 else 0]
    elif call.name.startswith("binary_cross_entropy"):
        classes = 2
    else:
        return not_applicable(f"{call.name} has no loss of a uniform guess")
    if loss is None:
        return not_applicable("the targets are not class indices, or the call has raised an error")
    uniform = math.log(classes)
    text = f"{loss:.3g} at the start, a uniform guess of {classes} classes has ln({classes}) = {uniform:.3g}"
    return finding(text) if not loss <= uniform * START_FACTOR + START_MORE else fine(text)


def probabilities(case: Case) -> Answer:
    """Something else than the loss function takes: probabilities for logits, logits for log-probabilities."""
    calls = _calls(case)
    if isinstance(calls, Answer):
        return calls
    first = calls[0]
    same = [call.input.float() for call in calls if call.name == first.name and call.input.numel()]
    if not same or not all(bool(each.isfinite().all()) for each in same):
        return not_applicable("the output is not finite")
    within = all(bool(((each >= 0) & (each <= 1)).all()) for each in same)
    many = sum(each.numel() for each in same) >= FEWEST_VALUES
    if first.name == "cross_entropy" and first.input.ndim > 1:
        if within and all(bool(((each.sum(1) - 1).abs() < SUM_TO_ONE).all()) for each in same):
            return finding("probabilities, not logits, reach cross_entropy, which takes their softmax once more")
        if within and many:
            return finding("all logits that reach cross_entropy lie in 0 to 1, as after a sigmoid or a ReLU")
        return fine("logits reach cross_entropy")
    if first.name == "binary_cross_entropy_with_logits":
        if within and many:
            return finding(f"all logits that reach {first.name} lie in 0 to 1, as after a sigmoid")
        return fine(f"logits reach {first.name}")
    if first.name == "nll_loss" and first.input.ndim > 1:
        total = max(float(torch.logsumexp(each, 1).abs().max()) for each in same)
        if total > SUM_TO_ONE * 10:
            return finding(f"what reaches nll_loss are no log-probabilities: their logsumexp is {total:.3g}, not 0")
        return fine("log-probabilities reach nll_loss")
    return not_applicable(f"{first.name} takes any number")


def summed(case: Case) -> Answer:
    """A loss that grows with the batch."""
    calls = _calls(case)
    if isinstance(calls, Answer):
        return calls
    call, loss = calls[0], case.first.loss[0]
    if call.value is None or call.reduction != "sum":
        return fine(f"{call.name} with reduction={call.reduction!r}")
    value = float(call.value)
    text = f"{call.name} with reduction='sum': {value:.3g} for the first batch, the loss is {loss:.3g}"
    return finding(text) if abs(loss) >= SHARE_OF_LOSS * abs(value) else fine(f"{text}, so it was divided")


def broadcast(case: Case) -> Answer:
    """Output and target of other shapes, which are repeated to fit."""
    calls = _calls(case)
    if isinstance(calls, Answer):
        return calls
    compared = [call for call in calls if call.name in _DIFFERENCES]
    if not compared:
        return not_applicable(f"{calls[0].name} does not repeat its arguments")
    for call in compared:
        if call.input.shape != call.target.shape:
            shapes = f"{tuple(call.input.shape)} and {tuple(call.target.shape)}"
            return finding(f"{call.name} of output and target of shapes {shapes}")
    return fine(f"{compared[0].name} of equal shapes")


def _calls(case: Case) -> list[LossCall] | Answer:
    if (answer := case.untrained()) is not None:
        return answer
    calls = [step[0] for step in case.first.calls if step]
    return calls or not_applicable(_UNSEEN)
