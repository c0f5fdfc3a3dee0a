"""The number of micro-batches in a step is a function of the number of applied steps, or of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch import Trainer

from stabletrain.core.accumulation_plan import Plan, plan
from stabletrain.core.lengths import Length, LengthLike
from stabletrain.runtime.windows.planned_windows import PlannedWindows


class AccumulateScheduled(PlannedWindows):
    """Accumulate over a number of micro-batches that changes at given steps or tokens.

    A change takes effect at the start of a window, also within an epoch. A shorter window, as at the end of an epoch,
    is the mean over what it holds (see ``AccumulateMean``).

    Args:
        schedule: from which position on a step has which size. Positions are applied steps (``500``) or tokens
            (``"1e9tok"``, all windows counted as full); the first one is 0.
        unit: of the sizes: ``"micro_batches"``, or ``"samples"`` or ``"tokens"`` in a step over all ranks.
        samples_per_batch: samples in a micro-batch of one rank; None: the train loader's ``batch_size``.
        tokens_per_sample: tokens in a sample, needed for positions or sizes in tokens.

    Raises:
        UserError: if an argument is out of range; when training starts, if a size is no multiple of what a micro-batch
            of all ranks has, or the module steps by hand.

    >>> AccumulateScheduled({0: 1, 1000: 4}).schedule
    {0: 1, 1000: 4}
    """

    plugin: ClassVar[str] = "accumulate_scheduled"

    def __init__(
        self,
        schedule: Mapping[LengthLike, int] | None = None,
        unit: Literal["micro_batches", "samples", "tokens"] = "micro_batches",
        samples_per_batch: int | None = None,
        tokens_per_sample: int | None = None,
    ) -> None:
        self._check_positive(samples_per_batch=samples_per_batch, tokens_per_sample=tokens_per_sample)
        self._require(unit in _UNITS, "unit", " or ".join(f'"{each}"' for each in _UNITS), unit)
        given: Any = {0: 1} if schedule is None else schedule
        self._require(
            isinstance(given, Mapping) and bool(given), "schedule", "sizes by position, such as {0: 1, 1000: 4}", given
        )
        for size in given.values():
            whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
            self._require(whole, "schedule", "sizes that are whole numbers >= 1", dict(given))
        self.schedule = dict(given)
        self.unit = unit
        self.samples_per_batch = samples_per_batch
        self.tokens_per_sample = tokens_per_sample
        self._positions = [(Length.parse(each, name=self._key("schedule")), size) for each, size in given.items()]
        in_tokens = unit == "tokens" or any(length.unit == "tokens" for length, _ in self._positions)
        needed = "a whole number >= 1, since the schedule is in tokens"
        self._require(not in_tokens or tokens_per_sample is not None, "tokens_per_sample", needed, tokens_per_sample)
        plan(self._positions, 1, self._key("schedule"))  # its other mistakes

    def _make_plan(self, trainer: Trainer) -> Plan | None:
        sizes: list[tuple[Length, int]] = []
        for length, size in self._positions:
            found = size if self.unit == "micro_batches" else self._size_of(trainer, size, self.unit, "schedule")
            if found is None:
                return None
            sizes.append((length, found))
        tokens = None
        if any(length.unit == "tokens" for length, _ in sizes) and (tokens := self._tokens(trainer)) is None:
            return None
        return plan(sizes, tokens, self._key("schedule"))


_UNITS = ("micro_batches", "samples", "tokens")
