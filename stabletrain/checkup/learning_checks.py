"""Checks of learning: a few steps of copies, at the configured learning rate and at others, and on one batch."""

from __future__ import annotations

import math

from stabletrain.checkup.answer import Answer, finding, fine, not_applicable
from stabletrain.checkup.case import FIRST, FITTED, RATE_STEPS, Case, fitted

RISES, RISES_BY = 0.02, 0.02
BETTER, LAST = 0.97, 20
LONG_EPOCH = 200
WORSE, LEARNS_MORE, LEARNS_LEAST = 0.05, 5.0, 0.02
NO_LOSS = 1e-3
_LATE = "the time was over"


def nonfinite_loss(case: Case) -> Answer:
    """A loss that is NaN or infinite."""
    if (answer := case.untrained()) is not None:
        return answer
    loss = case.first.loss
    bad = next((i for i, each in enumerate(loss) if not math.isfinite(each)), None)
    return fine(f"{len(loss)} losses") if bad is None else finding(f"the loss of backward pass {bad} is {loss[bad]}")


def rises(case: Case) -> Answer:
    """A loss that is higher after some steps than at the start."""
    if (answer := case.unlearned(RATE_STEPS)) is not None:
        return answer
    loss = case.first.loss
    start, end = sum(loss[:5]) / 5, _end(loss)
    text = f"{start:.3g} at the start, {end:.3g} after {len(loss)} steps at the configured rate"
    return finding(text) if not end <= start + abs(start) * RISES + RISES_BY else fine(text)


def no_better_than_guessing(case: Case) -> Answer:
    """A loss that a constant output reaches, too."""
    if (answer := case.unlearned(FIRST)) is not None:
        return answer
    steps = case.first
    if (reached := _reached(steps.plain)) is None or (prior := steps.prior.loss) is None:
        return not_applicable("no cross_entropy, nll_loss, binary_cross_entropy or mse_loss with the usual targets")
    epoch = case.train.epoch
    if reached > BETTER * prior and (epoch is None or epoch >= LONG_EPOCH):
        if case.out_of_time:
            return not_applicable(f"{_LATE}; {reached:.3g} after {len(steps.loss)} steps, guessing gives {prior:.3g}")
        steps = case.longer
        again, prior_again = _reached(steps.plain), steps.prior.loss
        if steps.was_late or again is None or prior_again is None:
            return not_applicable(f"{_LATE}; {reached:.3g} after {FIRST} steps, guessing gives {prior:.3g}")
        reached, prior = again, prior_again
    text = f"loss {reached:.3g} after {len(steps.loss)} steps, the best constant output has {prior:.3g}"
    if case.is_tokens and max(reached, prior) < 20:
        text += f" (perplexity {math.exp(reached):.3g} and {math.exp(prior):.3g})"
    return finding(text) if reached > BETTER * prior else fine(text)


def rate_too_high(case: Case) -> Answer:
    """A tenth of the learning rate is better."""
    if (answer := _other_rates(case)) is not None:
        return answer
    found = case.at_rate(0.1)
    if found is None:
        return not_applicable(_LATE)
    own, tenth = found
    text = f"after {RATE_STEPS} steps: {own:.3g} at the configured rate, {tenth:.3g} at a tenth"
    return finding(text) if tenth < own - WORSE * abs(case.first.loss[0]) else fine(text)


def rate_too_low(case: Case) -> Answer:
    """A hundred times the learning rate learns much more."""
    if (answer := _other_rates(case)) is not None:
        return answer
    found = case.at_rate(100.0)
    if found is None:
        return not_applicable(_LATE)
    own, hundred = found
    start = case.first.loss[0]
    text = f"after {RATE_STEPS} steps: {own:.3g} at the configured rate, {hundred:.3g} at a hundred times"
    more = start - hundred > LEARNS_MORE * max(start - own, 0.0) + LEARNS_LEAST * abs(start)
    return finding(text) if more else fine(text)


def one_batch(case: Case) -> Answer:
    """A single batch cannot be fitted."""
    if (answer := _other_rates(case)) is not None:
        return answer
    best, start = math.inf, 0.0
    for factor in (1.0, 10.0):
        steps = case.on_one_batch(factor)
        if steps.error is not None or not steps.loss:
            continue
        start = steps.loss[0]
        best = min(best, fitted(steps.loss))
        if best < FITTED * start or best < NO_LOSS:
            return fine(f"{start:.3g} at the start, {best:.3g} after {len(steps.loss)} steps on the first batch")
        if steps.was_late:
            return not_applicable(f"{_LATE}; {start:.3g} at the start, {best:.3g} after {len(steps.loss)} steps")
    if start <= 0:
        return not_applicable("the loss may be negative, so that a share of it says nothing")
    return finding(f"the first batch alone, 150 steps, also at ten times the rate: from {start:.3g} to {best:.3g}")


def _other_rates(case: Case) -> Answer | None:
    if (answer := case.unlearned(1)) is not None:
        return answer
    if case.out_of_time:
        return not_applicable(_LATE)
    if not case.first.rates or not case.first.rates[0]:
        return not_applicable("there is no optimizer")
    return None


def _end(loss: list[float]) -> float:
    last = loss[-LAST:]
    return sum(last) / len(last)


def _reached(plain: list[float | None]) -> float | None:
    """The mean of the last known losses; None if they are not known."""
    last = plain[-LAST:]
    known = [each for each in last if each is not None]
    if len(known) < len(last) or not known or not all(map(math.isfinite, known)):
        return None
    return sum(known) / len(known)
