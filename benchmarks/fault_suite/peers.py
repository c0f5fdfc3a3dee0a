"""Other projects' protections, run with their own code and defaults. They are imported only when they are used.

pip install -e '.[peers]'
"""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer


def zclip_callback() -> list[L.Callback]:
    from zclip import ZClipLightningCallback

    return [ZClipLightningCallback()]


def arc_callback() -> list[L.Callback]:
    from arc.api.integrations import LightningCallback

    return [LightningCallback(verbose=False)]


def adamw_clip(module: L.LightningModule, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> Optimizer:
    from AdamWClip import AdamWClip

    optimizer: Optimizer = AdamWClip(groups, **arguments)
    return optimizer


def stability_guard(module: L.LightningModule, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> Optimizer:
    return GuardedAdamW(module, groups, arguments)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW in stabilityguard's ``GuardedOptimizer``, used as its documentation says: backward, then a step.

    Lightning passes a closure that computes the gradients to ``step``. ``GuardedOptimizer.step(closure)`` would look at
    the gradients before it calls the closure, so the closure is called first here.
    """

    def __init__(self, module: L.LightningModule, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
        from stabilityguard import GuardedOptimizer

        super().__init__(groups, foreach=True, **arguments)
        # what GuardedOptimizer uses of the optimizer it wraps
        inner = SimpleNamespace(param_groups=self.param_groups, step=super().step, zero_grad=self.zero_grad)
        folder = tempfile.mkdtemp(prefix="stabilityguard")
        self.guard = GuardedOptimizer(inner, module, nan_action="skip", log_dir=folder, verbose=False)
        self.guard._spike_logger.enable_stdout = self.guard._spike_logger.enable_file = False

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.guard.step()
        return loss
