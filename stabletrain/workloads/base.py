import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch import Callback
from torch import Tensor

from stabletrain.core.metric_names import MetricInfo, is_own, new_name
from stabletrain.errors import UserError

METRICS = (MetricInfo("train/loss", "nats", "mean of the finite steps since the last validation; at each validation"),)

logger = logging.getLogger("stabletrain")


class Workload(L.LightningModule):
    """A LightningModule that logs `train/loss`, the mean since the last validation, at each validation.

    Metrics are updated and logged in hooks, not in steps, so that `torch.compile` compiles tensor operations only.
    `self.log` at every step would cost more than a small model's optimizer; two sums on the device cost microseconds.
    Non-finite losses are excluded from the mean; the guard reports them as events.
    """

    data_option: ClassVar[str | None] = None
    """The option of the config group ``data`` whose batches the module trains on; None: any."""

    _loss_sum: Tensor | None = None
    _loss_count: Tensor | None = None

    def configure_callbacks(self) -> list[Callback]:
        """Let callbacks that monitor a metric of this module by an old name, such as `val_loss`, use the present one.

        Lightning calls it before the callbacks are set up.
        """
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            present = new_name(monitor) if isinstance(monitor, str) else ""
            if present not in ("", monitor) and not is_own(present):
                callback.monitor = present
                if self.trainer.is_global_zero:
                    name = type(callback).__name__
                    logger.warning("%s monitors %r, which is now called %r: use that", name, monitor, present)
        return []

    def setup(self, stage: str) -> None:
        """Refuse the data module of another workload, whose batches have other shapes.

        Raises:
            UserError: if the data module has a ``data_option``, and it is another one.
        """
        data = getattr(self.trainer, "datamodule", None)
        given = getattr(data, "data_option", self.data_option)
        if self.data_option is not None and given != self.data_option:
            raise UserError(
                f"data: {type(self).__name__} trains on data={self.data_option}, got {type(data).__name__}; "
                f"use data={self.data_option}"
            )

    def on_train_batch_end(self, outputs: Tensor | Mapping[str, Any] | None, batch: Any, batch_idx: int) -> None:
        """Add the loss to the mean."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return
        finite = loss.isfinite()
        self._add(loss.float().where(finite, 0.0), finite.long())

    def on_validation_epoch_end(self) -> None:
        """Log the mean and reset it."""
        if self._loss_sum is None or self._loss_count is None:
            return
        self.log("train/loss", self._loss_sum / self._loss_count, sync_dist=True)
        self._loss_sum = self._loss_count = None

    def _add(self, loss: Tensor, count: Tensor) -> None:
        if self._loss_sum is None or self._loss_count is None:
            self._loss_sum, self._loss_count = loss, count
        else:
            self._loss_sum, self._loss_count = self._loss_sum + loss, self._loss_count + count
