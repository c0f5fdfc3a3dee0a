"""Lightning's ThroughputMonitor for configs, which cannot hold its functions."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor

from stabletrain.errors import UserError
from stabletrain.runtime.windows.batches import samples_and_tokens

_NAME = "flops_per_batch"


class CountedThroughput(ThroughputMonitor):
    """Log batches, samples and operations per second, and on GPUs that Lightning knows the share of their peak (MFU).

    It is Lightning's ThroughputMonitor, with the rows of a batch's first tensor as samples, and the module's attribute
    ``flops_per_batch``, unless it has one, set for the time of a fit.

    Args:
        flops_per_batch: operations of a micro-batch on one device, as ``stabletrain plan`` counts them; None: the
            module has them, or only batches and samples are logged.
        window_size: batches over which rates are averaged, at least 2.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(self, flops_per_batch: int | None = None, window_size: int = 100) -> None:
        for name, value, least in ((_NAME, flops_per_batch, 1), ("window_size", window_size, 2)):
            if value is not None and value < least:
                raise UserError(f"{name}: expected at least {least}, got {value!r} (config key callbacks.throughput)")
        super().__init__(batch_size_fn=_samples, window_size=window_size)
        self.flops_per_batch = flops_per_batch
        self._has_set = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the number to the module."""
        super().setup(trainer, pl_module, stage)
        if self.flops_per_batch is not None and not hasattr(pl_module, _NAME):
            setattr(pl_module, _NAME, self.flops_per_batch)
            self._has_set = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take it away again."""
        if self._has_set:
            delattr(pl_module, _NAME)
            self._has_set = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take it away again: after an exception Lightning calls no teardown."""
        self.teardown(trainer, pl_module, "fit")


def _samples(batch: Any) -> int:
    return samples_and_tokens(batch)[0] or 1
