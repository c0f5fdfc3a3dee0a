"""The devices of the tests in tests/gpu: CUDA, and the CPU in forced device mode with the same trainings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fits
import torch
from fits import OPTIMIZERS, Net
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

import stabletrain as st
from stabletrain.runtime.guard.callbacks import GuardMember

FUSED: dict[str, Callable[[Any], Optimizer]] = {
    "adamw-fused": OPTIMIZERS["adamw-fused"],
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, fused=True),
    "sgd-fused": OPTIMIZERS["sgd-fused"],
}
"""Whose kernels drop a step themselves, in device mode."""
READ_BY_HOST = {name: OPTIMIZERS[name] for name in ("adamw-foreach", "adamw-8bit")}


@dataclass(frozen=True)
class Place:
    """A kind of device.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """

    device: str

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def backend(self) -> str:
        """Of the process group."""
        return "nccl" if self.on_cuda else "gloo"

    def guard(self, fused: bool, precision: str = "32-true") -> st.Guard:
        """Options with which decisions are made on the device, where that is possible; on CUDA these are the defaults.

        Args:
            fused: whether the optimizer is.
            precision: of the training.
        """
        forced = not self.on_cuda and fused and precision != "16-mixed"
        return st.Guard(mode="device" if forced else "auto")

    def options(self, precision: str = "32-true", **scaler: Any) -> dict[str, Any]:
        """Options of the Trainer.

        Args:
            precision: as the Trainer's; with ``"16-mixed"`` there is a real loss scaler.
            scaler: arguments of the GradScaler.
        """
        options: dict[str, Any] = {"accelerator": "gpu" if self.on_cuda else "cpu"}
        if precision != "16-mixed":
            return {**options, "precision": precision}
        made = torch.amp.GradScaler(self.device, **{"init_scale": 1024.0, "growth_interval": 3, **scaler})
        return {**options, "plugins": [MixedPrecision("16-mixed", self.device, scaler=made)]}

    def fit(self, module: LightningModule, items: Any, *callbacks: Callback, **options: Any) -> Trainer:
        """Train as `fits.fit` does.

        Args:
            module: is trained.
            items: the batches, or a loader.
            callbacks: of the Trainer.
            options: those of `options` and of `fits.fit`.
        """
        own = {key: options.pop(key) for key in ("precision", "init_scale", "growth_interval") if key in options}
        return fits.fit(module, items, *callbacks, **{**self.options(**own), **options})


CPU, CUDA = Place("cpu"), Place("cuda")


class Trained(Net):
    """The network of `fits`, with an optimizer of this module's lists.

    Args:
        optimizer: of `FUSED` or `READ_BY_HOST`.
        dropout: probability.
        norm: whether there is batch normalisation.
        compiled: arguments of ``torch.compile`` for the layers; None: not compiled.
    """

    def __init__(
        self, optimizer: str, dropout: float = 0.0, norm: bool = True, compiled: dict[str, Any] | None = None
    ) -> None:
        super().__init__(dropout=dropout, norm=norm)
        self.make = {**FUSED, **READ_BY_HOST}[optimizer]
        if compiled is not None:
            self.net.compile(**compiled)

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())


class Where(GuardMember):
    """Records losses, whether decisions are made on the device, and the state of the device's random generator."""

    def __init__(self) -> None:
        self.on_device: bool | None = None
        self.generator = torch.empty(0)
        self.losses: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        assert self._guard is not None
        self.on_device = self._guard.on_device
        self.losses.append(float(arguments[2]["loss"]))
        on_cuda = arguments[1].device.type == "cuda"
        self.generator = torch.cuda.get_rng_state() if on_cuda else torch.get_rng_state()


class DeviceFails(Callback):
    """Raises what a CUDA call raises when its device is lost, in the middle of a step.

    Args:
        at: number of the batch.
        then: called before, so that the device is of no use afterwards.
    """

    def __init__(self, at: int, then: Callable[[], None]) -> None:
        self.at, self.then = at, then

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.at:
            self.then()
            kind: Any = getattr(torch, "AcceleratorError", RuntimeError)
            try:
                error = kind("CUDA error: unspecified launch failure", 719)
            except TypeError:  # older versions take the text only
                error = kind("CUDA error: unspecified launch failure")
            raise error


class TinyMLP(LightningModule):
    """Two layers and a fused optimizer; a batch is ``(x, y)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3, fused=True)
