"""The lines of a plan about tokens, operations, the learning rate, time and cost."""

from __future__ import annotations

from collections.abc import Iterator

from stabletrain.cli.columns import columns
from stabletrain.planning.plan import Flops, Measured, Plan

CHINCHILLA = 20
"""Tokens for each parameter that make the best use of compute in pretraining: Hoffmann et al. 2022, arXiv 2203.15556,
of which table 3 has 20 for models of 400 M to 10 B parameters."""

_Rows = Iterator[tuple[str, str]]


def count(elements: float) -> str:
    """A large number as text.

    >>> count(426_496), count(12), count(3.2e9)
    ('426.5 k', '12', '3.2 billion')
    """
    for size, unit in ((10**12, "trillion"), (10**9, "billion"), (10**6, "M"), (10**3, "k")):
        if elements >= size:
            return f"{elements / size:.4g} {unit}"
    return f"{elements:g}"


def parameters(plan: Plan) -> str:
    """How many parameters there are, in embeddings and trained."""
    text = f"{count(plan.parameters)} parameters"
    if plan.flops is not None and plan.flops.embeddings:
        text += f", {count(plan.flops.embeddings)} of them in embeddings"
    if plan.trained != plan.parameters:
        share = plan.trained / plan.parameters if plan.parameters else 0.0
        text += f"; {count(plan.trained)} are trained ({share:.1%})"
    return text


def steps(plan: Plan) -> str:
    """How long the run is, and what a step holds."""
    text = "an unknown number of steps" if plan.steps is None else f"{plan.steps} steps"
    if plan.steps_per_epoch is not None:
        text += f", {plan.steps_per_epoch:g} in an epoch"
    if plan.epochs is not None:
        text += f", {_epochs(plan.epochs)}"
    if plan.micro_batches > 1:
        text += f", {plan.micro_batches} micro-batches in each"
    if plan.samples_per_step is not None:
        text += f"; {plan.samples_per_step} samples"
        text += f" with {plan.tokens_per_step} tokens" if plan.tokens_per_step is not None else ""
        text += " in a step"
    return text


def tokens(plan: Plan) -> str | None:
    """Tokens for each parameter, beside the number for pretraining; None: the data are no tokens."""
    if plan.tokens_per_step is None or not plan.parameters:
        return None
    if plan.steps is None:
        return "How many tokens the run reads is unknown, as is the number of its steps."
    whole = plan.tokens_per_step * plan.steps
    again = f", those of {_epochs(plan.epochs)} together" if plan.epochs is not None and plan.epochs > 1 else ""
    return (
        f"{count(whole)} tokens{again}: {whole / plan.parameters:.3g} for each parameter. In pretraining on text that "
        f"is read once, about {CHINCHILLA} make the best use of the compute (Hoffmann et al. 2022)."
    )


def operations(plan: Plan) -> _Rows:
    """Rows about the operations of a step."""
    flops, step = plan.flops, plan.flops_per_step
    if flops is None or step is None:
        return
    yield "counted", _flop(step)
    if flops.attention and flops.micro_batch:
        share = flops.attention / flops.micro_batch
        yield "  of these, attention", f"{_flop(step * share)} ({share:.1%})"
    per_step = plan.tokens_per_step if plan.tokens_per_step is not None else plan.samples_per_step
    if per_step and step:
        unit = "tokens" if plan.tokens_per_step is not None else "samples"
        yield f"6 x parameters x {unit}", _beside(6 * plan.parameters * per_step, step)
        if flops.embeddings:
            yield "  without embeddings", _beside(6 * (plan.parameters - flops.embeddings) * per_step, step)
    if plan.steps is not None:
        yield "counted, of the whole run", _flop(step * plan.steps)


def about_operations(plan: Plan) -> Iterator[str]:
    """Sentences about what was counted and what not."""
    flops = plan.flops
    if flops is None:
        if plan.no_flops_since is not None:
            yield f"The operations could not be counted: {plan.no_flops_since}."
        return
    yield from _about(flops)
    yield f"For Lightning's ThroughputMonitor: {throughput_override(flops)}"


def _about(flops: Flops) -> Iterator[str]:
    if flops.uncounted:
        names = ", ".join(flops.uncounted)
        yield f"While these modules were called nothing was counted, so there are more operations than shown: {names}."
    if flops.tokens is None:
        yield (
            "6 x parameters x samples is right for one use of each weight per sample; a convolution, for example, uses "
            "its weights at every place."
        )
    if flops.recomputes:
        yield "The module computes a part of its forward pass a second time for the backward pass, which is counted."


def throughput_override(flops: Flops) -> str:
    """The overrides that let ThroughputMonitor log operations per second and, on known GPUs, the share of the peak.

    Args:
        flops: of the run's micro-batch.
    """
    return f"callbacks/throughput=monitor callbacks.throughput.flops_per_batch={flops.micro_batch}"


def learning_rate(plan: Plan) -> Iterator[str]:
    """The schedule, drawn."""
    curve = next((each.curve for each in plan.plugins if each.curve), ())
    base = "of the optimizer" if plan.rate is None else f"{plan.rate:g}"
    if not curve:
        if plan.scheduler:
            yield f"learning rate: {base}, changed by the module's own {plan.scheduler}, which is not drawn"
        elif plan.rate is not None and not any(each.key == "schedule" for each in plan.plugins):
            yield f"learning rate: {base}, constant"
        return
    highest, last = max(curve), curve[-1]
    top = f"{plan.rate * highest:.3g}" if plan.rate is not None else f"{highest:.3g} x the optimizer's"
    end = f"{plan.rate * last:.3g}" if plan.rate is not None else f"{last:.3g} x it"
    yield f"learning rate: at most {top}, at the end {end}"
    yield from (f"  {line}" for line in columns(curve))
    right = f"{plan.steps} steps" if plan.steps is not None else ""
    yield f"  0{right.rjust(max(len(curve) - 1, len(right) + 1))}"


def timing(plan: Plan, measured: Measured) -> _Rows:
    """Rows about the measured steps, and what follows."""
    yield "a step, median", f"{_seconds(measured.seconds)} (of {measured.steps}, on {measured.device})"
    yield "  half of them", f"{_seconds(measured.low)} to {_seconds(measured.high)}"
    if plan.tokens_per_step is not None:
        yield "tokens per second", count(plan.tokens_per_step / measured.seconds)
    elif plan.samples_per_step is not None:
        yield "samples per second", count(plan.samples_per_step / measured.seconds)
    if plan.flops_per_step:
        yield "operations per second", _flop(plan.flops_per_step / measured.seconds)
        if measured.mfu is not None:
            yield "  share of the peak (MFU)", f"{measured.mfu:.1%}"
        else:
            yield "  share of the peak (MFU)", f"unknown: Lightning knows no peak of {measured.device}"
    yield "the run's steps", "unknown: so is their number" if measured.hours is None else _hours(measured.hours)
    if measured.price is not None:
        devices = plan.processes * plan.nodes
        cost = "unknown" if measured.cost is None else f"{measured.cost:.3g}"
        yield f"cost, at {measured.price:g} per hour of each of {devices}", cost


ABOUT_TIME = "Validation, checkpoints and the start come on top of the time of the steps."


def _epochs(number: float) -> str:
    return f"{number:.3g} epochs" if number < 1000 else f"{number:,.0f} epochs"


def _flop(amount: float) -> str:
    for size, unit in ((10**18, "EFLOP"), (10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP"), (10**6, "MFLOP")):
        if amount >= size:
            return f"{amount / size:.4g} {unit}"
    return f"{amount:.0f} FLOP"


def _beside(amount: float, counted: float) -> str:
    return f"{_flop(amount)} ({amount / counted:.3f} of the counted)"


def _seconds(amount: float) -> str:
    return f"{amount:.3g} s" if amount >= 1 else f"{amount * 1000:.3g} ms"


def _hours(amount: float) -> str:
    if amount >= 48:
        return f"{amount / 24:.3g} days"
    return (
        f"{amount:.3g} h" if amount >= 1 else f"{amount * 60:.3g} min" if amount * 60 >= 2 else _seconds(amount * 3600)
    )
