"""The largest curvature of the loss in the optimizer's own scale, over what the learning rate can follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def sharpness(net: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> float:
    """The largest eigenvalue of ``P^-1/2 H P^-1/2``, times the learning rate, over the edge of stability.

    ``H`` is the Hessian of the loss, ``P`` is 1 for SGD and ``sqrt(v) + eps`` for Adam. The edge is ``2 (1 + m) / (1 -
    m)`` with ``m = beta1`` over the rate for Adam, and ``2 (1 + m)`` with momentum ``m`` for SGD (Cohen et al. 2021,
    arXiv 2103.00065; 2022, arXiv 2207.14484): above 1, steps overshoot. Elements whose second moment is 0, such as rows
    of an embedding that were never used, are left out.

    By Lanczos, since power iteration finds the most negative eigenvalue where that is larger. Buffers are as before:
    batch norm learns from each forward pass.

    Returns:
        The ratio, at least 1e-9; infinity if a product with the Hessian is not finite.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    parameters = [p for p in net.parameters() if p.requires_grad]
    scales = _scales(parameters, optimizer)
    sizes = [p.numel() for p in parameters]
    buffers = [buffer.clone() for buffer in net.buffers()]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
        finite = True

        def product(vector: np.ndarray) -> np.ndarray:
            nonlocal finite
            parts = torch.from_numpy(np.ascontiguousarray(vector.ravel())).float().split(sizes)
            scaled = [part.view_as(p) * scale for part, p, scale in zip(parts, parameters, scales, strict=True)]
            found = torch.autograd.grad(gradients, parameters, scaled, retain_graph=True, materialize_grads=True)
            flat = torch.cat([(h * scale).flatten() for h, scale in zip(found, scales, strict=True)])
            if not bool(torch.isfinite(flat).all()):
                finite = False
                return np.zeros(len(flat))
            return flat.double().numpy()

        operator = LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(sum(sizes))
        try:
            largest = float(eigsh(operator, k=1, which="LA", ncv=10, tol=0.02, v0=start, return_eigenvectors=False)[0])
        except ArpackNoConvergence as error:
            largest = float(max(error.eigenvalues, default=math.nan))
    with torch.no_grad():
        for buffer, before in zip(net.buffers(), buffers, strict=True):
            buffer.copy_(before)
    if not finite:
        return math.inf
    group = optimizer.param_groups[0]
    edge = 2 * (1 + group["momentum"]) if "momentum" in group else 2 * (1 + group["betas"][0]) / (1 - group["betas"][0])
    return max(largest, 1e-9) * group["lr"] / edge


def _scales(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """``P^-1/2`` of each parameter."""
    group = optimizer.param_groups[0]
    scales = []
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            scales.append(torch.ones_like(parameter))
            continue
        moment = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        scales.append(torch.where(moment > 0, (moment.sqrt() + group["eps"]).rsqrt(), 0.0))
    return scales
