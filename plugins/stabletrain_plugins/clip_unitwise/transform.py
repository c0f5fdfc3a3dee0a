"""Unit-wise adaptive gradient clipping (AGC)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from stabletrain.errors import UserError
from stabletrain.runtime import gradients
from stabletrain.runtime.guard.transform import TransformCallback
from stabletrain.runtime.internals import trainer as trainer_internals


@dataclass(eq=False)
class ClipUnitwise(TransformCallback):
    """Clip the gradient of each output unit to a share of the unit's weight norm (AGC).

    ``G_i <- G_i * min(1, max_ratio * max(||W_i||, eps) / ||G_i||)``, where unit i is a row (all entries that share an
    index of the first dimension) of a tensor with two dimensions or more, and any other tensor is one unit. Works on
    plain and on sharded parameters. A non-finite unit is not changed; rules that skip use the raw norm.

    Args:
        max_ratio: largest ratio of a unit's gradient norm to its weight norm, > 0.
        eps: floor of the weight norm, so that units that are initialised to zero can be trained, > 0.
        exclude: parameters that are not clipped, as shell patterns of their names in the module, such as ``"head.*"``.
        name: name in checkpoints; needed when one run has two of them.

    Raises:
        UserError: if an argument is out of range, a pattern matches no parameter, or a gradient is sparse.

    References:
        Brock, De, Smith and Simonyan, High-performance large-scale image recognition without normalization, 2021,
        https://arxiv.org/abs/2102.06171

    >>> weight, gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.01]])
    >>> ClipUnitwise(max_ratio=0.1, eps=0.01).transform(["w"], [weight], [gradient])
    >>> gradient
    tensor([[0.3000, 0.4000],
            [0.0000, 0.0010]])
    """

    plugin = "clip_unitwise"
    slot = "clip"

    max_ratio: float = 0.01
    eps: float = 1e-3
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.require(self.max_ratio > 0, "max_ratio", "> 0")
        self.require(self.eps > 0, "eps", "> 0")
        self.require(not isinstance(self.exclude, str), "exclude", 'a list of patterns, such as ["head.*"]')
        self.exclude = tuple(self.exclude)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error if a pattern of `exclude` matches no parameter: it is misspelt."""
        super().on_fit_start(trainer, pl_module)
        names = [name for name, _ in trainer_internals.unwrapped(pl_module).named_parameters()]
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"{self.plugin}: exclude has the pattern {pattern!r}, which matches none of the module's "
                    f"{len(names)} parameters ({', '.join(names[:3])}, ...); correct or remove it "
                    f"(config key plugins.{self.slot}.exclude)"
                )

    def transform(self, names: Sequence[str], parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Clip all units of the parameters that are not excluded."""
        included = _included(tuple(names), tuple(self.exclude))
        for i in included:
            if grads[i].is_sparse:
                raise UserError(
                    f"{self.plugin}: the gradient of {names[i]} is sparse, which AGC does not support; add its name to "
                    f"exclude (config key plugins.{self.slot}.exclude)"
                )
        if not included:
            return
        selected = [grads[i] for i in included]
        norms = gradients.unit_norms([*(parameters[i] for i in included), *selected])
        units = len(norms) // 2
        weight_norms, grad_norms = norms[:units], norms[units:]
        limits = self.max_ratio * weight_norms.clamp_min(self.eps)
        above = (grad_norms > limits) & grad_norms.isfinite()
        gradients.scale_units_(selected, torch.where(above, limits / grad_norms, 1.0))


@functools.lru_cache(maxsize=64)
def _included(names: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(i for i, name in enumerate(names) if not any(fnmatchcase(name, pattern) for pattern in exclude))
