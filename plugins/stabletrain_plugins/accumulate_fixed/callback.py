"""Every step has the same number of micro-batches, given as such or as a number of samples or tokens."""

from __future__ import annotations

from typing import ClassVar

from lightning.pytorch import Trainer

from stabletrain.core.accumulation_plan import Plan, Stage
from stabletrain.errors import UserError
from stabletrain.runtime.windows.planned_windows import PlannedWindows


class AccumulateFixed(PlannedWindows):
    """Accumulate the gradient of each step over so many micro-batches, samples or tokens.

    A shorter window, as at the end of an epoch, is the mean over what it holds (see ``AccumulateMean``).

    Args:
        micro_batches: in a step, >= 1; None: from a target, or ``Trainer(accumulate_grad_batches=...)``.
        target_samples: samples in a step over all ranks, instead of ``micro_batches``.
        target_tokens: tokens in a step over all ranks, instead of ``micro_batches``.
        samples_per_batch: samples in a micro-batch of one rank; None: the train loader's ``batch_size``.
        tokens_per_sample: tokens in a sample, needed for ``target_tokens``.

    Raises:
        UserError: if an argument is out of range, or there are two sizes; when training starts, if a target is no
            multiple of what a micro-batch of all ranks has, or the module steps by hand.

    >>> AccumulateFixed(target_samples=256).target_samples
    256
    """

    plugin: ClassVar[str] = "accumulate_fixed"

    def __init__(
        self,
        micro_batches: int | None = None,
        target_samples: int | None = None,
        target_tokens: int | None = None,
        samples_per_batch: int | None = None,
        tokens_per_sample: int | None = None,
    ) -> None:
        sizes = {"micro_batches": micro_batches, "target_samples": target_samples, "target_tokens": target_tokens}
        self._check_positive(**sizes, samples_per_batch=samples_per_batch, tokens_per_sample=tokens_per_sample)
        given = {key: value for key, value in sizes.items() if value is not None}
        if len(given) > 1:
            both = " and ".join(f"{key}={value}" for key, value in given.items())
            raise UserError(f"{self._key(next(iter(given)))}: expected one size of a step, got {both}")
        self._require(
            target_tokens is None or tokens_per_sample is not None,
            "tokens_per_sample",
            "a whole number >= 1, since target_tokens is given",
            tokens_per_sample,
        )
        self.micro_batches = micro_batches
        self.target_samples = target_samples
        self.target_tokens = target_tokens
        self.samples_per_batch = samples_per_batch
        self.tokens_per_sample = tokens_per_sample

    def _make_plan(self, trainer: Trainer) -> Plan | None:
        size = self.micro_batches
        if self.target_samples is not None:
            size = self._size_of(trainer, self.target_samples, "samples", "target_samples")
        elif self.target_tokens is not None:
            size = self._size_of(trainer, self.target_tokens, "tokens", "target_tokens")
        elif size is None:
            size = trainer.accumulate_grad_batches
        return None if size is None else (Stage(0, size),)
