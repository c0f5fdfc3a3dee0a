"""Readings of single tensors: how far a step moves a weight, RMS_t of Adam, and the spectral norm of a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stabletrain.runtime import gradients
from stabletrain.runtime.internals import sharded_norms

FIRST_ITERATIONS, ITERATIONS = 20, 2
"""Power iterations for a matrix that is new, and for one whose vector is known from the last measurement."""


class UpdateRatios:
    """How far the step in progress moves each weight: the norm of its change divided by its norm before.

    The weights are copied, and compared in a hook at the end of ``optimizer.step``. A collective if they are sharded.

    Args:
        optimizer: whose step is in progress.
        parameters: that the step may change.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self._parameters = [p.detach() for p in parameters]
        with torch.no_grad():
            self._before = [p.clone() for p in self._parameters]
        self._found: tuple[Tensor, Tensor] | None = None
        self._error: Exception | None = None
        self._handle = None
        with suppress(AttributeError, TypeError):  # an optimizer without torch's constructor has no hooks
            self._handle = optimizer.register_step_post_hook(self._after)

    def close(self) -> None:
        """Drop the copies; the step was not applied, or everything is known."""
        self._before = []
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def take(self) -> tuple[Tensor, Tensor]:
        """The norms of the changes, and those of the weights before, as vectors; the step has been applied.

        Raises:
            Exception: what has gone wrong in reading them, such as a lack of memory; the step itself was not disturbed.
        """
        if self._found is None and self._error is None:  # an optimizer that calls no hooks
            self._after()
        if self._error is not None:
            raise self._error
        assert self._found is not None, "set by _after"
        return self._found

    def _after(self, *_: Any) -> None:
        try:
            if self._before:
                self._found = self._compare()
        except Exception as error:
            self._error = error
        finally:
            self.close()

    @torch.no_grad()
    def _compare(self) -> tuple[Tensor, Tensor]:
        norms = gradients.tensor_norms(self._before)
        changes = self._before
        if any(isinstance(each, DTensor) for each in changes):
            changes = [before - now for before, now in zip(changes, self._parameters, strict=True)]
        else:
            torch._foreach_sub_(changes, self._parameters)
        return gradients.tensor_norms(changes), norms


@torch.no_grad()
def rms_t(optimizers: Iterable[Optimizer], parameters: Sequence[Tensor]) -> dict[int, Tensor]:
    """RMS_t of each parameter with a second moment (Adam and its kind), by its index; 0-d tensors.

    The root of the mean of g^2 / u, where u is the bias-corrected second moment with this step's g in it (Wortsman et
    al., arXiv 2304.13013, section 3.4). Elements whose second moment was 0 until now are left out, such as the rows of
    an embedding that no batch had; NaN if that is all. A collective if parameters are sharded.

    Args:
        optimizers: that have the state.
        parameters: those of the step.
    """
    state = {p: known_moment for each in optimizers for group in each.param_groups for p in group["params"]
             if (known_moment := _second_moment(p, each.state.get(p, {}), group)) is not None}  # fmt: skip
    known = [i for i, p in enumerate(parameters) if p in state and p.grad is not None and not p.grad.is_sparse]
    sums, counts = list[Tensor](), list[Tensor]()
    for i in known:
        second, beta, step, eps = state[parameters[i]]
        square = gradients.local(gradients.of((parameters[i],))[0]).float().square()
        moment = gradients.local(second).float()
        correction = 1 - beta ** (step + 1)
        expected = (moment * beta + square * (1 - beta)) / correction
        seen = moment > 0
        sums.append((square / expected.clamp_min(eps**2)).masked_fill(~seen, 0.0).sum().sqrt())
        counts.append(seen.sum().float().sqrt())
    if not known:
        return {}
    own_parameters = [parameters[i].detach() for i in known]
    total, count = (sharded_norms.tensor_norms(own_parameters, each) for each in (sums, counts))
    return dict(zip(known, (total / count).unbind(), strict=True))


class _SecondMoment(NamedTuple):
    """That of a parameter, before the step.

    Args:
        moment: the mean of the squared gradient, not corrected for its start at 0.
        beta: what is left of it in a step.
        step: number of steps that it was made in.
        eps: that is added to its root.
    """

    moment: Tensor
    beta: Any
    step: Any
    eps: float


def _second_moment(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> _SecondMoment | None:
    """None if the optimizer is not of Adam's kind; the step is counted for the whole group in some packages."""
    moment, betas, step = state.get("exp_avg_sq"), group.get("betas"), state.get("step", group.get("step"))
    is_number = isinstance(step, Tensor | int | float)
    if not isinstance(moment, Tensor) or moment.shape != p.shape or not p.is_floating_point() or not is_number:
        return None
    if not isinstance(betas, tuple | list) or len(betas) < 2:
        return None
    eps = group.get("eps")
    return _SecondMoment(moment, betas[1], step, eps if isinstance(eps, float) else 0.0)


class SpectralNorms:
    """The largest singular value of matrices, by power iterations that go on from the vector of the last measurement.

    The value is a lower bound, which converges. The vectors are not part of a checkpoint: a resumed run begins with
    more iterations. The random numbers of the training are not used.
    """

    def __init__(self) -> None:
        self._vectors: dict[Tensor, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def of(self, parameters: Sequence[Tensor]) -> dict[int, Tensor]:
        """The norm of each parameter with two dimensions, by its index; 0-d tensors. A collective for sharded ones."""
        return {i: self._norm(p) for i, p in enumerate(parameters)
                if p.ndim == 2 and p.numel() and p.is_floating_point()}  # fmt: skip

    def _norm(self, p: Tensor) -> Tensor:
        whole = p.full_tensor() if isinstance(p, DTensor) else p.detach()
        matrix = whole if whole.dtype is torch.float64 else whole.float()
        if known := self._vectors.get(p):
            start, vector = known
        else:
            generator = torch.Generator().manual_seed(0)
            start = torch.randn(matrix.shape[1], generator=generator).to(matrix.device, matrix.dtype)
            start = vector = start / torch.linalg.vector_norm(start)
        for _ in range(ITERATIONS if known else FIRST_ITERATIONS):
            after = matrix.mT @ (matrix @ vector)
            size = torch.linalg.vector_norm(after)
            # a matrix of zeros, or with a NaN, leaves no direction: begin anew
            vector = torch.where(size.isfinite() & (size > 0), after / size, start)
        self._vectors[p] = start, vector
        norm: Tensor = torch.linalg.vector_norm(matrix @ vector)
        return norm
