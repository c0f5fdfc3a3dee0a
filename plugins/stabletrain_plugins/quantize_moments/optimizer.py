"""The 8-bit optimizers of bitsandbytes whose 8-bit form is the algorithm of their name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stabletrain.errors import is_number, require
from stabletrain_plugins.quantize_moments.bits import Bits, BitsPerGroup, bitsandbytes_class


class AdamW8bit(BitsPerGroup, bitsandbytes_class("AdamW8bit")):  # type: ignore[misc]
    """AdamW with both moments in 8 bits: 2.03 bytes of state per parameter instead of 8.

    Args:
        params: parameters, or groups. A group's ``optim_bits`` (8 or 32) sets the bits of its state; a ``kind`` of
            ``"embedding"`` means ``embedding_bits``.
        lr: learning rate.
        betas: decay of the first and the second moment, each 0 to 1.
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled, >= 0.
        min_8bit_size: tensors with fewer elements have 32-bit state, >= 0.
        embedding_bits: 8 or 32.

    Raises:
        UserError: if bitsandbytes is not installed, or a value is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        min_8bit_size: int = 4096,
        embedding_bits: Bits = 32,
    ) -> None:
        super().__init__(params, lr, _betas(self, betas, 2), eps, weight_decay, min_8bit_size=min_8bit_size)
        self.own_exceptions(embedding_bits, min_8bit_size)


class PagedAdamW8bit(BitsPerGroup, bitsandbytes_class("PagedAdamW8bit")):  # type: ignore[misc]
    """`AdamW8bit` whose state moves to the host's memory when the GPU's is full; on the CPU it is `AdamW8bit`.

    Args: as `AdamW8bit`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        min_8bit_size: int = 4096,
        embedding_bits: Bits = 32,
    ) -> None:
        super().__init__(params, lr, _betas(self, betas, 2), eps, weight_decay, min_8bit_size=min_8bit_size)
        self.own_exceptions(embedding_bits, min_8bit_size)


class Adam8bit(BitsPerGroup, bitsandbytes_class("Adam8bit")):  # type: ignore[misc]
    """Adam with both moments in 8 bits. bitsandbytes decouples its weight decay: with one it is `AdamW8bit`.

    Args: as `AdamW8bit`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
        embedding_bits: Bits = 32,
    ) -> None:
        super().__init__(params, lr, _betas(self, betas, 2), eps, weight_decay, min_8bit_size=min_8bit_size)
        self.own_exceptions(embedding_bits, min_8bit_size)


class Lion8bit(BitsPerGroup, bitsandbytes_class("Lion8bit")):  # type: ignore[misc]
    """Lion with its moment in 8 bits: 1.02 bytes of state per parameter.

    Args:
        params: as of `AdamW8bit`.
        lr: learning rate; 3 to 10 times smaller than AdamW's.
        betas: decay of the update's and of the stored average, each 0 to 1.
        weight_decay: decoupled, >= 0.
        min_8bit_size: tensors with fewer elements have 32-bit state, >= 0.
        embedding_bits: 8 or 32.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 1.0,
        min_8bit_size: int = 4096,
        embedding_bits: Bits = 32,
    ) -> None:
        super().__init__(params, lr, _betas(self, betas, 2), weight_decay, min_8bit_size=min_8bit_size)
        self.own_exceptions(embedding_bits, min_8bit_size)


class RMSprop8bit(BitsPerGroup, bitsandbytes_class("RMSprop8bit")):  # type: ignore[misc]
    """RMSprop with its second moment in 8 bits: 1.02 bytes of state per parameter.

    Args:
        params: as of `AdamW8bit`.
        lr: learning rate.
        alpha: decay of the second moment, 0 to 1.
        eps: added to the root of the second moment, > 0.
        weight_decay: an L2 penalty in the gradient, >= 0.
        min_8bit_size: tensors with fewer elements have 32-bit state, >= 0.
        embedding_bits: 8 or 32.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
        embedding_bits: Bits = 32,
    ) -> None:
        super().__init__(params, lr, alpha, eps, weight_decay, min_8bit_size=min_8bit_size)
        self.own_exceptions(embedding_bits, min_8bit_size)


class SGD8bit(BitsPerGroup, bitsandbytes_class("SGD8bit")):  # type: ignore[misc]
    """Stochastic gradient descent with its momentum in 8 bits: 1.02 bytes of state per parameter.

    Args:
        params: as of `AdamW8bit`.
        lr: learning rate.
        momentum: decay of the sum of gradients, above 0, below 1. bitsandbytes ignores Nesterov and dampening.
        weight_decay: an L2 penalty in the gradient, >= 0.
        min_8bit_size: tensors with fewer elements have 32-bit state, >= 0.
        embedding_bits: 8 or 32.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        min_8bit_size: int = 4096,
        embedding_bits: Bits = 32,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay, min_8bit_size=min_8bit_size)
        self.own_exceptions(embedding_bits, min_8bit_size)


class AdEMAMix8bit(BitsPerGroup, bitsandbytes_class("AdEMAMix8bit")):  # type: ignore[misc]
    """AdEMAMix (AdamW with a second, slow average of the gradient) in 8 bits: 3.05 bytes of state per parameter.

    Args:
        params: as of `AdamW8bit`.
        lr: learning rate.
        betas: decay of the fast average, the second moment and the slow average, each 0 to 1.
        alpha: weight of the slow average, >= 0.
        t_alpha: steps over which alpha grows to its value; None: none.
        t_beta3: steps over which the slow average's decay grows to its value; None: none.
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled, >= 0.
        min_8bit_size: tensors with fewer elements have 32-bit state, >= 0.
        embedding_bits: 8 or 32.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        min_8bit_size: int = 4096,
        embedding_bits: Bits = 32,
    ) -> None:
        super().__init__(params, lr, _betas(self, betas, 3), alpha, t_alpha, t_beta3, eps, weight_decay, min_8bit_size)
        self.own_exceptions(embedding_bits, min_8bit_size)


def _betas(owner: object, betas: Any, count: int) -> tuple[float, ...]:
    """The decays, as many as the algorithm has: bitsandbytes takes 0 for one that is missing."""
    ok = isinstance(betas, Sequence) and len(betas) == count and all(map(is_number, betas))
    require(ok, type(owner).__name__, "betas", f"{count} numbers", betas, "optimizer")
    return tuple(betas)
