"""Mixup and CutMix of a batch of images: two images and their two labels become one example."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mixed(NamedTuple):
    """A batch of which each example is ``share`` of one image and the rest of another.

    Args:
        images: (batch, channels, height, width).
        labels: (batch,), of the first image.
        others: (batch,), of the second image.
        share: 0-d, of the first image and its label, in [0, 1].
    """

    images: Tensor
    labels: Tensor
    others: Tensor
    share: Tensor

    def cross_entropy(self, logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The mean of both labels' losses, each weighted by its share of the image.

        Args:
            logits: (batch, classes).
            label_smoothing: as in `torch.nn.functional.cross_entropy`.
        """
        first = F.cross_entropy(logits, self.labels, label_smoothing=label_smoothing)
        second = F.cross_entropy(logits, self.others, label_smoothing=label_smoothing)
        return self.share * first + (1.0 - self.share) * second


def mix(images: Tensor, labels: Tensor, mixup: float, cutmix: float) -> Mixed:
    """Mix every image with another one of the batch, by mixup or by CutMix; if both are on, by one of them at random.

    Mixup (Zhang et al. 2017, https://arxiv.org/abs/1710.09412) averages the pixels. CutMix (Yun et al. 2019,
    https://arxiv.org/abs/1905.04899) replaces a rectangle. The share is drawn once for a batch from Beta(alpha, alpha),
    by torch's generator of the CPU.

    Args:
        images: (batch, channels, height, width).
        labels: (batch,), int64.
        mixup: alpha of mixup, >= 0; 0: off.
        cutmix: alpha of CutMix, >= 0; 0: off.
    """
    cuts = cutmix > 0 and (mixup == 0 or bool(torch.rand(()) < 0.5))
    alpha = cutmix if cuts else mixup
    share = torch.distributions.Beta(alpha, alpha).sample()
    order = torch.randperm(len(images)).to(images.device)
    if not cuts:
        share = share.to(images)
        return Mixed(images.lerp(images[order], 1.0 - share), labels, labels[order], share)
    height, width = images.shape[-2:]
    rows, columns = (round(size * float((1.0 - share).sqrt())) for size in (height, width))
    top = int(torch.randint(height - rows + 1, ()))
    left = int(torch.randint(width - columns + 1, ()))
    mixed = images.clone()
    mixed[..., top : top + rows, left : left + columns] = images[order, :, top : top + rows, left : left + columns]
    kept = 1.0 - rows * columns / (height * width)  # of whole pixels
    return Mixed(mixed, labels, labels[order], torch.tensor(kept, device=images.device, dtype=images.dtype))
