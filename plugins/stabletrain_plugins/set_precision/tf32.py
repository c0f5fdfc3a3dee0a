"""TF32 matrix products, a setting of the process, for the time of a fit."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger("stabletrain")
_CAPABILITY = (8, 0)


def allow_tf32(device: torch.device) -> Callable[[], None]:
    """Let matrix products and convolutions of a GPU use TF32; elsewhere nothing changes, which is logged.

    Args:
        device: of the training.

    Returns:
        The function that restores the settings.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        logger.info("precision tf32: %s has no TF32: everything is computed in fp32", device)
        return lambda: None
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True

    def undo() -> None:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions

    return undo
