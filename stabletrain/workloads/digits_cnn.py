from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from stabletrain.core.metric_names import MetricInfo
from stabletrain.optim.groups import parameter_groups
from stabletrain.workloads.arguments import number, whole
from stabletrain.workloads.base import Workload
from stabletrain.workloads.metrics import WeightedMean
from stabletrain.workloads.mixing import mix

METRICS = (
    MetricInfo("val/loss", "nats", "mean over the validation"),
    MetricInfo("val/accuracy", "0 to 1", "share of the validation's images that are recognised"),
)


class DigitsCNN(Workload):
    """Small convolutional network with batch normalisation and dropout for 8 x 8 digits.

    Training images are shifted at random by up to one pixel each way. Logs `val/loss` (nats), `val/accuracy` (0 .. 1)
    and `train/loss`.

    Args:
        width: channels of the first stage, at least 1; the second has twice as many.
        dropout: probability before the last layer, 0 <= p < 1.
        max_shift: maximum random shift, in pixels, 0 to 3; 0: off.
        label_smoothing: fraction of the target distributed over all classes, 0 <= s < 1.
        mixup: alpha of mixup, at least 0; 0: off. See `mixing.mix`.
        cutmix: alpha of CutMix, at least 0; 0: off. With mixup, one of both is drawn for each batch.
        lr: learning rate of the default SGD, above 0.
        momentum: Nesterov momentum of the default SGD, 0 < m < 1.
        weight_decay: of the default SGD, on weights but not on biases and norms, at least 0.
    """

    data_option = "digits"

    def __init__(
        self,
        width: int = 32,
        dropout: float = 0.3,
        max_shift: int = 1,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        whole("model.width", width, 1, 16_384)
        whole("model.max_shift", max_shift, 0, 3)
        number("model.dropout", dropout, 0, 1)
        number("model.label_smoothing", label_smoothing, 0, 1)
        number("model.mixup", mixup, 0, 1000)
        number("model.cutmix", cutmix, 0, 1000)
        number("model.lr", lr, above_least=True)
        number("model.momentum", momentum, 0, 1, above_least=True)
        number("model.weight_decay", weight_decay)
        self.save_hyperparameters(logger=False)
        self.net = nn.Sequential(
            *_stage(1, width),
            *_stage(width, width),
            nn.MaxPool2d(2),
            *_stage(width, 2 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * 2 * 2, 10),
        )
        self.max_shift, self.lr, self.momentum, self.weight_decay = max_shift, lr, momentum, weight_decay
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix
        self.val_loss = WeightedMean()
        self.val_accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, 10) of images (batch, 1, 8, 8)."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch of shifted, and perhaps mixed, images."""
        images, labels = batch
        images = shift_randomly(images, self.max_shift)
        if self.mixup or self.cutmix:
            mixed = mix(images, labels, self.mixup, self.cutmix)
            return mixed.cross_entropy(self(mixed.images), self.label_smoothing)
        return F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return cross-entropy and logits of one batch."""
        images, labels = batch
        logits = self(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def on_validation_batch_end(
        self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update loss and accuracy."""
        _, labels = batch
        self.val_loss.update(outputs["loss"], len(labels))
        self.val_accuracy.update(outputs["logits"], labels)

    def on_validation_epoch_end(self) -> None:
        """Log validation loss, accuracy and training loss."""
        super().on_validation_epoch_end()
        self.log("val/loss", self.val_loss)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum and a constant learning rate."""
        groups = parameter_groups(self, weight_decay=self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=True)


def shift_randomly(images: Tensor, max_shift: int) -> Tensor:
    """Shift each image by its own random number of pixels in both directions, padded with zeros.

    Args:
        images: (batch, channels, height, width).
        max_shift: maximum shift in pixels, at least 0; shifts are drawn from -max_shift .. max_shift.
    """
    if max_shift == 0:
        return images
    batch, _, height, width = images.shape
    windows = F.pad(images, (max_shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * max_shift + 1, (2, batch), device=images.device)
    return windows[torch.arange(batch, device=images.device), :, down, right]


def _stage(channels: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
