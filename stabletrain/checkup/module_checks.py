"""Checks of the module: what it trains, and what its first steps show inside it."""

from __future__ import annotations

from collections.abc import Sequence

from stabletrain.checkup.answer import Answer, finding, fine, not_applicable
from stabletrain.checkup.case import Case

FEW_VALUES = 16
ACTIVE, DEAD = 1e-3, 0.5
LARGE_OUTPUT, SMALL_OUTPUT = 1e2, 1e-6
SAME_OUTPUT = 1e-6


def raises(case: Case) -> Answer:
    """An exception of the module while it trains."""
    if not case.has_batches:
        return not_applicable("the train loader has given no batch")
    steps = case.first
    if steps.error is not None:
        at = f"in batch {max(0, steps.batches - 1)}" if steps.batches else "before the first batch"
        return finding(f"{at}: {type(steps.error).__name__}: {steps.error}", steps.trace)
    if not steps.loss:
        return finding(f"training_step has returned no loss in {steps.batches} batches, so nothing is trained")
    return fine(f"{steps.batches} batches")


def frozen(case: Case) -> Answer:
    """Parameters that are not trained."""
    if (answer := case.untrained()) is not None:
        return answer
    parameters = list(case.first.module.named_parameters())
    names = [name for name, p in parameters if not p.requires_grad]
    if not names:
        return fine()
    count = sum(p.numel() for _, p in parameters if not p.requires_grad)
    whole = sum(p.numel() for _, p in parameters)
    return finding(f"{count} of {whole} parameters have requires_grad=False: {_few(names)}")


def unused(case: Case) -> Answer:
    """Trained parameters that get no gradient."""
    if (answer := case.untrained()) is not None:
        return answer
    names = case.first.without_gradient
    if names is None:
        return not_applicable("manual optimization, or no step of an optimizer")
    return finding(f"no gradient in the first step: {_few(names)}") if names else fine()


def not_in_optimizer(case: Case) -> Answer:
    """Trained parameters that no optimizer has."""
    if (answer := case.untrained()) is not None:
        return answer
    names = case.first.not_in_optimizer
    return finding(f"in no optimizer: {_few(names)}") if names else fine()


def eval_mode(case: Case) -> Answer:
    """Normalisation or dropout in eval mode while training."""
    if (answer := case.untrained()) is not None:
        return answer
    names = list(case.first.first.in_eval)
    return finding(f"in eval mode while training: {_few(names)}") if names else fine()


def few_values(case: Case) -> Answer:
    """BatchNorm over few values of each channel."""
    if (answer := case.untrained()) is not None:
        return answer
    counts = case.first.first.per_channel
    if not counts:
        return not_applicable("no BatchNorm in training mode")
    name = min(counts, key=lambda each: counts[each])
    text = f"{name} takes its statistics of {counts[name]} values per channel"
    return finding(text) if counts[name] < FEW_VALUES else fine(text)


def dead_units(case: Case) -> Answer:
    """Units that are never above zero."""
    if (answer := case.untrained()) is not None:
        return answer
    shares = {name: float((each <= ACTIVE).float().mean()) for name, each in case.first.first.active.items()}
    if not shares:
        return not_applicable("no ReLU, GELU or SiLU was seen")
    name = max(shares, key=lambda each: shares[each])
    text = f"{name}: {shares[name]:.0%} of its units were not active in {len(case.first.calls)} batches"
    return finding(text) if shares[name] > DEAD else fine(text)


def output_scale(case: Case) -> Answer:
    """Size of the outputs of layers at the start."""
    if (answer := case.untrained()) is not None:
        return answer
    sizes = case.first.first.rms
    if len(sizes) < 3:
        return not_applicable(f"{len(sizes)} linear, convolution or recurrent layers were seen, at least 3 are needed")
    small, large = min(sizes, key=lambda each: sizes[each]), max(sizes, key=lambda each: sizes[each])
    text = f"root mean square of outputs from {sizes[small]:.2g} ({small}) to {sizes[large]:.2g} ({large})"
    # a last layer of zeros is a usual initialisation: its output is 0
    low = min((each for each in sizes.values() if each), default=1.0)
    return finding(text) if sizes[large] > LARGE_OUTPUT or low < SMALL_OUTPUT else fine(text)


def ignores_input(case: Case) -> Answer:
    """The same output for other batches, after the first steps, with the same weights and random numbers."""
    if (answer := case.untrained()) is not None:
        return answer
    if len(case.lab.batches) < 2:
        return not_applicable("there is one batch")
    if case.out_of_time:
        return not_applicable("the time was over")
    calls = case.same_dice.calls
    if case.same_dice.error is not None or len(calls) < 2 or not calls[0] or not calls[1]:
        return not_applicable("no call of a loss function was seen in two batches")
    first, second = calls[0][0].input, calls[1][0].input
    if first.shape != second.shape:
        return not_applicable("the outputs of two batches have other shapes")
    if not bool(first.isfinite().all()):
        return not_applicable("the output is not finite")
    size = max(1.0, float(first.abs().max()))
    difference = float((first - second).abs().max())
    text = f"the outputs for two batches differ by at most {difference:.2g}"
    if not difference < SAME_OUTPUT * size:
        return fine(text)
    if not case.first.module.automatic_optimization:
        return not_applicable(f"manual optimization: {text}, but the first loss may be about noise, as of a generator")
    return finding(text)


def stale_gradients(case: Case) -> Answer:
    """Gradients that are not zero before the backward pass."""
    if (answer := case.untrained()) is not None:
        return answer
    if not case.first.module.automatic_optimization:
        return not_applicable("manual optimization: several backward passes before a step may be meant")
    if case.first.stale:
        return finding(f"gradients are not zero before the backward pass, in {case.first.stale} of the first steps")
    return fine()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
