"""What a micro-batch changes, kept so that it can be run again."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import Tensor

from stabletrain.runtime import rng
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.guard.module_buffers import ModuleBuffers
from stabletrain.runtime.hidden.hidden_state import HiddenState


class Before:
    """Gradients, buffers, hidden state, random generators and losses as they were before a micro-batch.

    Args:
        module: the module that is trained.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._buffers, self._hidden = ModuleBuffers(module), HiddenState(module)

    def keep(self, window: AccumulationWindow, gradients: bool) -> None:
        """Keep them.

        Args:
            window: the one in progress.
            gradients: also keep the gradients, which takes as much memory as the parameters.
        """
        self._buffers.stash()
        self._hidden.stash()
        self._rng = rng.capture_quickly()
        self._mark = window.mark()
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        if gradients:
            own = [p for p in self._module.parameters() if p.requires_grad]
            self._gradients = [(p, None if p.grad is None else p.grad.clone()) for p in own]

    def restore(self, window: AccumulationWindow) -> None:
        """Put everything back; what was kept stays."""
        self._hidden.restore()
        self._buffers.restore()
        self.restore_random()
        window.cut(self._mark)
        for p, gradient in self._gradients:
            p.grad = None if gradient is None else gradient.clone()

    def restore_random(self) -> None:
        """Put the random generators back."""
        rng.restore(self._rng.to_state())

    def join(self, window: AccumulationWindow) -> None:
        """The pieces since then are one micro-batch."""
        window.join(self._mark)
        self._gradients = []
