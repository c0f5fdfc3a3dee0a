"""Tensor-wise adaptive gradient clipping (AdaGC)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabletrain.runtime import gradients
from stabletrain.runtime.guard.transform import TransformCallback


@dataclass(eq=False)
class ClipTensorwise(TransformCallback):
    """Clip each tensor's gradient norm by a moving average of its own past norms (AdaGC).

    Applied steps t are counted from 1. While ``t < warmup_steps`` the global norm is clipped to ``max_norm``, and
    ``gamma_i`` is the smallest norm of tensor i so far. From then on ``g_i <- g_i * min(1, max_ratio * gamma_i /
    ||g_i||)`` and ``gamma_i <- decay * gamma_i + (1 - decay) * ||g_i||``, with the clipped norm. Zero and non-finite
    norms do not enter ``gamma_i``, nor do dropped steps. A non-finite gradient and a tensor without ``gamma_i`` are not
    clipped.

    Args:
        max_ratio: largest ratio of a tensor's gradient norm to its ``gamma`` (lambda_rel of the paper), > 0.
        decay: weight of the past in ``gamma`` (beta of the paper), in [0, 1).
        warmup_steps: applied step from which on tensors are clipped by their own history, >= 0.
        max_norm: largest global L2 norm during warm-up (lambda_abs of the paper), > 0.
        name: name in checkpoints; needed when one run has two of them.

    Raises:
        UserError: if an argument is out of range.

    References:
        Wang et al., AdaGC: improving training stability for large language model pretraining, 2025,
        https://arxiv.org/abs/2502.11034

    >>> clip = ClipTensorwise(max_ratio=1.5, warmup_steps=2)
    >>> for norm in (0.5, 8.0):
    ...     gradient = torch.tensor([norm])
    ...     clip.transform(["w"], [gradient], [gradient])
    ...     clip.commit(applied=True)
    >>> gradient, round(clip.gamma("w"), 3)
    (tensor([0.7500]), 0.505)
    """

    plugin = "clip_tensorwise"
    slot = "clip"
    per_optimizer = ("_applied", "_rows", "_gammas", "_next", "_indices")

    max_ratio: float = 1.05
    decay: float = 0.98
    warmup_steps: int = 100
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        self.require(self.max_ratio > 0, "max_ratio", "> 0")
        self.require(0 <= self.decay < 1, "decay", "in [0, 1)")
        self.require(self.warmup_steps >= 0, "warmup_steps", ">= 0")
        self.require(self.max_norm > 0, "max_norm", "> 0")
        self.reset()

    def reset(self) -> None:
        """Clear the history."""
        for _ in self.each_optimizer():
            self.start_optimizer()

    def start_optimizer(self) -> None:
        """Clear the history of one optimizer."""
        self._applied = 0
        self._rows: dict[str, int] = {}
        self._gammas = torch.zeros(0)
        self._next: Tensor | None = None
        self._indices: dict[tuple[str, ...], Tensor] = {}

    def on_change(self) -> None:
        """Learn the reference norms anew."""
        self.reset()

    def gamma(self, name: str) -> float:
        """The reference norm of a parameter, by its name in the module; infinite without a history."""
        rows = [(self._gammas, self._rows[name]) for _ in self.each_optimizer() if name in self._rows]
        return rows[0][0][rows[0][1]].item() if rows else math.inf

    def transform(self, names: Sequence[str], parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Clip every tensor, and compute the next gammas, which `commit` stores."""
        norms = gradients.tensor_norms(grads)
        index = self._index(tuple(names), norms)
        gammas = self._gammas[index]
        if self._applied + 1 < self.warmup_steps:
            total = torch.linalg.vector_norm(norms)
            factors = (self.max_norm / total).clamp_max(1.0).where(total.isfinite(), 1.0).expand_as(norms)
            learned = torch.minimum(gammas, norms * factors)
        else:
            factors = (self.max_ratio * gammas / norms).clamp_max(1.0).where(norms.isfinite(), 1.0)
            clipped = norms * factors
            learned = torch.where(gammas.isfinite(), self.decay * gammas + (1.0 - self.decay) * clipped, clipped)
        factors = torch.where(norms > 0, factors, 1.0)
        learns = norms.isfinite() & (norms > 0)
        self._next = self._gammas.index_copy(0, index, torch.where(learns, learned, gammas))
        gradients.scale_each_(grads, factors)

    def commit(self, applied: bool) -> None:
        """Store the next gammas if the step was applied; else discard them."""
        if applied and self._next is not None:
            self._gammas = self._next
            self._applied += 1
        self._next = None

    def state_dict(self) -> dict[str, Any]:
        """Arguments, the number of applied steps, and each parameter's gamma."""
        plain = super().state_dict()  # must be first: it processes a pending outcome, which may update the history
        first, *others = [
            {"applied": self._applied, "names": list(self._rows), "gammas": self._gammas.cpu()}
            for _ in self.each_optimizer()
        ]
        return {**plain, "state": first, **({"optimizers": others} if others else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint; the first gradients decide the device."""
        super().load_state_dict(state_dict)
        saved = [state_dict["state"], *state_dict.get("optimizers", ())]
        for state in saved:
            if type(state["applied"]) is not int or state["gammas"].shape != (len(set(state["names"])),):
                raise ValueError("expected the number of steps, and one gamma for each name")
        self.reset()
        for state in self.each_of(saved):
            self._applied = state["applied"]
            self._rows = {name: row for row, name in enumerate(state["names"])}
            self._gammas = state["gammas"].clone()

    def _index(self, names: tuple[str, ...], norms: Tensor) -> Tensor:
        """Indices of these parameters in the gammas; adds new names, and moves the gammas to the norms' device."""
        index = self._indices.get(names)
        if index is None:
            for name in names:
                self._rows.setdefault(name, len(self._rows))
            index = torch.tensor([self._rows[name] for name in names], device=norms.device)
            self._indices[names] = index
        unknown = len(self._rows) - len(self._gammas)
        self._gammas = torch.cat([self._gammas.to(norms), norms.new_full((unknown,), math.inf)])
        return index
