"""Clip by global norm (Pascanu et al. 2013)."""

from __future__ import annotations

from dataclasses import dataclass

from stabletrain.core.limits import Bound, Limits
from stabletrain.core.rule import Rule


@dataclass(frozen=True)
class ClipNormRule(Rule[None]):
    """Clip the global gradient norm to a fixed maximum, ``g <- g * min(1, max_norm / ||g||)``.

    Args:
        max_norm: largest L2 norm of all gradients together, > 0.

    Raises:
        UserError: if ``max_norm`` is not positive.

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013,
        https://arxiv.org/abs/1211.5063

    >>> rule = ClipNormRule(max_norm=1.0)
    >>> rule.limits(rule.init()).clip(4.0)
    1.0
    """

    plugin = "clip_norm"
    slot = "clip"
    clips = True

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        self.require(self.max_norm > 0, "max_norm", "> 0")

    def init(self) -> None:
        """No state."""
        return

    def limits(self, state: None) -> Limits:
        """The same bound for every step."""
        return Limits.of(Bound(above=self.max_norm, target=self.max_norm))
