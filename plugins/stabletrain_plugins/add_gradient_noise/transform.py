"""Annealed Gaussian noise on the gradients."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from stabletrain.errors import is_number, is_whole
from stabletrain.runtime import gradients
from stabletrain.runtime.guard.transform import TransformCallback


@dataclass(eq=False)
class AddGradientNoise(TransformCallback):
    """Add independent normal noise to every element of the gradient, ``g <- g + N(0, std_t ** 2)``.

    ``std_t = std / (1 + t) ** (decay / 2)``, with t the applied steps before this one. The noise of a parameter is a
    function of the seed, t and the parameter's name alone. It takes nothing from the run's random generators, and is
    the same on any number of ranks, also if parameters are sharded. A dropped, rolled back or resumed step gets the
    noise that it would have had.

    Args:
        std: standard deviation in the first step, in the unit of the unscaled gradient, >= 0.
        decay: exponent of the variance's decay (gamma of the paper), >= 0; 0: constant.
        seed: of the noise.
        name: name in checkpoints; needed when one run has two of them.

    Raises:
        UserError: if an argument is out of range.

    References:
        Neelakantan et al., Adding gradient noise improves learning for very deep networks, 2015,
        https://arxiv.org/abs/1511.06807

    >>> noise, gradient = AddGradientNoise(std=0.1), torch.zeros(2)
    >>> noise.transform(["w"], [gradient], [gradient])
    >>> again = torch.zeros(2)
    >>> noise.transform(["w"], [again], [again])  # the first step was not applied: the same noise
    >>> torch.equal(gradient, again), bool(gradient.abs().max() > 0)
    (True, True)
    """

    plugin = "add_gradient_noise"
    slot = "noise"
    clips = False
    per_optimizer = ("_applied",)

    std: float = 0.1
    decay: float = 0.55
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(is_number(self.std) and 0 <= self.std < math.inf, "std", "a number >= 0")
        self.require(is_number(self.decay) and 0 <= self.decay < math.inf, "decay", "a number >= 0")
        self.require(is_whole(self.seed), "seed", "a whole number")
        self._generators: dict[torch.device, torch.Generator] = {}
        self.reset()

    def reset(self) -> None:
        """Begin with the noise of the first step."""
        for _ in self.each_optimizer():
            self.start_optimizer()

    def start_optimizer(self) -> None:
        """Begin with the noise of an optimizer's first step."""
        self._applied = 0

    def transform(self, names: Sequence[str], parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Add the noise of this step."""
        std = self.std / (1.0 + self._applied) ** (self.decay / 2)
        if std == 0.0:
            return
        gradients.coalesce_(grads)
        for name, gradient in zip(names, grads, strict=True):
            values = gradients.local(gradient)
            shape = gradient.shape if isinstance(gradient, DTensor) else values.shape
            whole = torch.empty(shape, dtype=values.dtype, device=values.device)
            whole.normal_(generator=self._generator(values.device, name))
            values.add_(_part_of(gradient, whole), alpha=std)

    def commit(self, applied: bool) -> None:
        """Go on to the noise of the next step, if this one was applied."""
        self._applied += applied

    def state_dict(self) -> dict[str, Any]:
        """Arguments, and the number of applied steps of each optimizer."""
        plain = super().state_dict()  # must be first: it processes a pending outcome
        return {**plain, "applied": [self._applied for _ in self.each_optimizer()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        super().load_state_dict(state_dict)
        saved = state_dict["applied"]
        if not saved or any(type(each) is not int or each < 0 for each in saved):
            raise ValueError("expected the number of applied steps of each optimizer")
        for applied in self.each_of(saved):
            self._applied = applied

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own generators, which are seeded before each use."""
        return {**super().__getstate__(), "_generators": {}}

    def _generator(self, device: torch.device, name: str) -> torch.Generator:
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        # a digest, because generators whose seeds differ in few bits may begin alike
        key = hashlib.blake2b(repr((int(self.seed), self._applied, name)).encode(), digest_size=8)
        return generator.manual_seed(int.from_bytes(key.digest(), "little") >> 1)


def _part_of(gradient: Tensor, whole: Tensor) -> Tensor:
    """The part of the whole noise that belongs to this rank's part of a gradient; without communication."""
    if not isinstance(gradient, DTensor):
        return whole
    return distribute_tensor(whole, gradient.device_mesh, gradient.placements, src_data_rank=None).to_local()
