"""What the checks are asked about: batches, and what was seen in a few steps of a copy, made when it is needed."""

from __future__ import annotations

import math
import time
from functools import cached_property

from stabletrain.checkup.answer import Answer, not_applicable
from stabletrain.checkup.batches import inputs
from stabletrain.checkup.reading import Batches
from stabletrain.checkup.training import Lab, Steps, scaled

FIRST = 120
"""Steps of the first fit."""
LONGER = 400
"""Steps, at most, of the fit that looks once more whether anything is learned."""
RATE_STEPS, RATE_MEAN = 60, 15
"""Steps at another learning rate, and how many of the last ones are averaged."""
ONE_BATCH, FITTED = 150, 0.7
"""Steps on one batch, and the share of the loss at the start below which it is fitted."""
SCAN = 60
"""Batches that the checks of the data read."""


class Case:
    """A module with its data.

    Args:
        lab: trains copies of the module; None: there is no batch.
        train: what was read of the train loader.
        val: what was read of the validation loader; None: there is none.
    """

    def __init__(self, lab: Lab | None, train: Batches, val: Batches | None) -> None:
        self._lab, self.train, self.val = lab, train, val

    @property
    def lab(self) -> Lab:
        """Trains copies of the module.

        Raises:
            LookupError: if there is no batch to train on.
        """
        if self._lab is None:
            raise LookupError("there is no batch")
        return self._lab

    @property
    def has_batches(self) -> bool:
        """Whether there is anything to train on."""
        return self._lab is not None

    @cached_property
    def first(self) -> Steps:
        """The first steps at the configured learning rate."""
        return self.lab.fit(FIRST, looks=True)

    @cached_property
    def longer(self) -> Steps:
        """The same for at most an epoch."""
        epoch = self.train.epoch
        return self.lab.fit(min(LONGER, epoch or LONGER), looks=True)

    def at_rate(self, factor: float) -> tuple[float, float] | None:
        """The loss after 60 steps on the same batches, at the configured learning rate and at another one.

        Args:
            factor: on the configured rate.

        Returns:
            Means of 15 steps, infinity if a loss is not finite; None if the time was over.
        """
        base = self.first.rates
        steps = self.lab.fit(RATE_STEPS, rate=lambda index: scaled(base[min(index, len(base) - 1)], factor))
        own, other = self.first.loss[: len(steps.loss)], steps.loss
        if steps.was_late or steps.error is not None or not len(own) == len(other) >= RATE_MEAN:
            return None
        return _last(own), _last(other)

    def on_one_batch(self, factor: float) -> Steps:
        """At most 150 steps on the first batch, fewer once it is fitted.

        Args:
            factor: on the configured learning rate.
        """
        base = self.first.rates
        return self.lab.fit(
            ONE_BATCH,
            batches=self.lab.batches[:1],
            rate=lambda index: scaled(base[min(index, len(base) - 1)], factor),
            enough=lambda loss: fitted(loss) < FITTED * loss[0],
        )

    @cached_property
    def same_dice(self) -> Steps:
        """Two more steps of the trained copy, on two batches, at a rate of 0 and with the same random numbers."""
        rates = self.first.rates[0]
        return self.lab.fit(2, module=self.first.module, looks=True, seed=0, rate=lambda index: scaled(rates, 0.0))

    # ---- why a check cannot judge ------------------------------------------------------------------------------------

    def untrained(self) -> Answer | None:
        """The answer of a check that needs steps, if there was none."""
        if not self.has_batches:
            return not_applicable("the train loader has given no batch")
        steps = self.first
        if steps.error is not None and not steps.loss:
            return not_applicable("no step of training was made, see: raises")
        if not steps.loss:
            return not_applicable("training_step has returned no loss")
        return None

    def unlearned(self, count: int) -> Answer | None:
        """The answer of a check that needs so many steps of automatic optimization, if there were fewer.

        Args:
            count: of steps.
        """
        if (answer := self.untrained()) is not None:
            return answer
        if not self.first.module.automatic_optimization:
            return not_applicable("manual optimization: a loss of one of its steps says nothing about the others")
        if self.first.error is not None:
            return not_applicable("training has ended early, see: raises")
        if len(self.first.loss) < count:
            why = "the time was over" if self.first.was_late else "training_step has returned no loss in others"
            return not_applicable(f"{len(self.first.loss)} of {count} steps: {why}")
        if not all(map(math.isfinite, self.first.loss[:count])):
            return not_applicable("the loss is not finite")
        return None

    @property
    def out_of_time(self) -> bool:
        """Whether no further step may be made."""
        return self.has_batches and time.monotonic() > self.lab.deadline

    @property
    def is_tokens(self) -> bool:
        """Whether the input is a matrix of whole numbers."""
        first = inputs(self.train.read[0]) if self.train.read else None
        return first is not None and first.ndim == 2 and not first.is_floating_point()


def fitted(loss: list[float]) -> float:
    """The lowest mean of five losses in a row; infinity if there are fewer.

    Args:
        loss: of each step.
    """
    means = [sum(loss[i : i + 5]) / 5 for i in range(len(loss) - 4)]
    return min((each for each in means if math.isfinite(each)), default=math.inf)


def _last(loss: list[float]) -> float:
    return sum(loss[-RATE_MEAN:]) / RATE_MEAN if all(map(math.isfinite, loss)) else math.inf
