"""The fp16 loss scale of a run: a floor, and a time in another format when it falls below."""

from __future__ import annotations

from typing import Literal

import torch

FallBack = Literal["bf16", "fp32"]
LARGEST = 65536.0
"""The scale at which torch's GradScaler starts."""


class LossScale:
    """Holds the scale of a GradScaler at a floor, or at 1 while the forward pass is computed in another format.

    Args:
        scaler: of the precision plugin.
        min_scale: the floor.
        fall_back: format of the forward pass after the scale has fallen below the floor; None: none.
        cool_down: length of that time in applied steps.
        init_scale: the scale after it.
    """

    def __init__(
        self,
        scaler: torch.amp.GradScaler,
        min_scale: float,
        fall_back: FallBack | None,
        cool_down: int,
        init_scale: float,
    ) -> None:
        self.scaler = scaler
        self.left = 0
        """Applied steps until the forward pass is computed in fp16 again; 0: it is."""
        self._min_scale, self._init_scale = min_scale, init_scale
        self._fall_back, self._cool_down = fall_back, cool_down

    @property
    def scale(self) -> float:
        """The scale of the next step."""
        return self.scaler.get_scale()

    def autocast(self, device: str) -> torch.autocast | None:
        """The context of a forward pass while it is computed in another format; None: fp16.

        Args:
            device: type of the device.
        """
        if not self.left:
            return None
        if self._fall_back == "fp32":
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False)

    def after_step(self, *, applied: bool, overflow: bool) -> str | None:
        """Set the scale of the next step.

        Args:
            applied: whether the step was applied.
            overflow: whether the loss scaler dropped it.

        Returns:
            What has changed, as a sentence; None if nothing has.
        """
        if self.left:
            self.left -= applied
            self._set(1.0 if self.left else self._init_scale)
            return None if self.left else f"back to fp16, at a loss scale of {self._init_scale:.6g}"
        if not overflow or (scale := self.scale) >= self._min_scale:
            return None
        if self._fall_back is None:
            self._set(self._min_scale)
            return f"fp16 overflow: the loss scale stays at its floor of {self._min_scale:.6g}"
        self.left = self._cool_down
        self._set(1.0)
        return (
            f"fp16 overflow: the loss scale fell to {scale:.6g}, below {self._min_scale:.6g}: the next "
            f"{self._cool_down} applied steps are computed in {self._fall_back}"
        )

    def _set(self, scale: float) -> None:
        state = self.scaler.state_dict()
        if state["scale"] != scale or state["_growth_tracker"]:
            self.scaler.load_state_dict({**state, "scale": scale, "_growth_tracker": 0})
