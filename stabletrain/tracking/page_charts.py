"""The charts of a page, and how each kind of event looks."""

from __future__ import annotations

from typing import NamedTuple


class Chart(NamedTuple):
    """A chart of a page.

    Args:
        key: of the curves in it.
        title: above it.
        unit: of its values.
        log: whether its axis is logarithmic at first.
        noisy: whether many runs have a smoothed line over a faint one.
    """

    key: str
    title: str
    unit: str
    log: bool = False
    noisy: bool = False


CHARTS = (
    Chart("loss", "Loss", "the module's unit, often nats", noisy=True),
    Chart("val_loss", "Validation loss", "the module's unit, often nats"),
    Chart("grad_norm", "Gradient norm", "global L2, before clipping", log=True, noisy=True),
    Chart("lr", "Learning rate", "of the first parameter group"),
    Chart("loss_scale", "Loss scale", "of the fp16 loss scaler", log=True),
)
"""All charts, in the order of the page; one without curves is left out."""


class Kind(NamedTuple):
    """How a kind of event looks.

    Args:
        key: an event's kind, or ``clip``.
        label: the word for one.
        meaning: what happened.
        shape: ``back``, ``circle``, ``cross``, ``diamond``, ``square``, ``tick`` or ``triangle``.
        colour: variable of the stylesheet.
        line: whether all charts show a line where it happened, since the run was another one from there on.
    """

    key: str
    label: str
    meaning: str
    shape: str
    colour: str
    line: bool = False


KINDS = (
    Kind("stop", "stop", "a plugin ended the run", "square", "--bad", line=True),
    Kind("rollback", "rollback", "training went back to an earlier state", "back", "--note", line=True),
    Kind("replicas_differ", "replicas differ", "ranks had different copies of the same weights", "square", "--bad"),
    Kind("divergence", "divergence", "the loss or the norm did not come back", "diamond", "--bad"),
    Kind("accept", "accepted", "a new level that going back did not change was accepted", "diamond", "--note"),
    Kind("rewarm", "re-warm-up", "the learning rate warmed up again", "triangle", "--note"),
    Kind("not_learning", "not learning", "the loss had not fallen", "diamond", "--warn"),
    Kind("overfitting", "overfitting", "the validation loss rose", "diamond", "--warn"),
    Kind("warning", "warning", "a reading above its limit", "diamond", "--warn"),
    Kind("regime", "new level", "the baselines were learned again", "circle", "--quiet"),
    Kind("announced", "announced", "a change by design", "circle", "--quiet"),
    Kind("nonfinite", "non-finite", "a NaN or an infinity", "cross", "--bad"),
    Kind("spike", "spike", "above the limit, and back", "triangle", "--warn"),
    Kind("skip", "skip", "the step was dropped: nothing was learned from it", "cross", "--c0"),
    Kind("overflow", "overflow", "dropped by the fp16 loss scaler", "circle", "--c6"),
    Kind("clip", "clip", "applied with a smaller gradient", "tick", "--c2"),
)
"""Kinds of events, those that change a run most first."""
