"""A setting as a LightningModule, whose batches are numbers of steps."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from early_warning_suite import data, models
from early_warning_suite.settings import Setting


class Training(L.LightningModule):
    """Trains a network as a setting says.

    Args:
        setting: what is trained.
        seed: of weights and batches.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.setting, self.seed = setting, seed
        self.net = models.build(setting.model, setting.layers, setting.width, setting.qk_norm)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the rate, and make weights grow."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer), "there is one"
        for group in optimizer.param_groups:
            group["lr"] = self.setting.lr * self.setting.rate(batch_idx)
        if self.setting.grow is not None:
            self.setting.grow(batch_idx, self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the step with this number, in nats."""
        return self.loss(*self.batch(batch_idx))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats; the logits are in float16 if the setting says so."""
        logits = self.net(inputs)
        if self.setting.fp16_logits:
            logits = logits.half()
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten()).float()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, with the faults of the data."""
        if self.setting.model == "cnn" or self.setting.data is None:
            return self.clean_batch(step)
        return self.setting.data(step, data.windows_of_text(self.seed, step))

    def clean_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, without faults of the data."""
        if self.setting.model == "cnn":
            return data.digits(self.seed, step)
        windows = data.windows_of_text(self.seed, step)
        return windows[:, :-1], windows[:, 1:]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, or SGD with momentum 0.9."""
        setting, parameters = self.setting, self.parameters()
        if setting.adamw:
            return torch.optim.AdamW(parameters, setting.lr, betas=(0.9, setting.beta2), weight_decay=setting.decay)
        return torch.optim.SGD(parameters, setting.lr, momentum=0.9, weight_decay=setting.decay)


def loader(steps: int) -> DataLoader[int]:
    """A loader whose batch is the number of the step."""
    return DataLoader(range(steps), batch_size=None)  # type: ignore[arg-type]
