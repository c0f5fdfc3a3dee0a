"""The largest and the smallest eigenvalue of the Hessian, and up to which one plain gradient descent is stable.

By the Lanczos method and not by power iteration, which finds the eigenvalue of the largest magnitude: on a freshly
initialised GPT that is the most negative one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOLERANCE = 1e-3
"""Relative error of an eigenvalue; of the smallest one in proportion to the width of the spectrum."""
_DENSE = 32
"""Up to so many variables the matrix itself is made."""
_RESTARTS = 20
"""Of the Lanczos method, with 19 further products each; most networks need none."""
USUAL_PRODUCTS = 42
"""For both eigenvalues, without a restart."""

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Both ends of the Hessian's spectrum.

    Args:
        largest: eigenvalue; None: not found.
        smallest: the same, with its sign.
        products: Hessian-vector products that were needed.
        problem: why one was not found; None: both were.
    """

    largest: float | None
    smallest: float | None
    products: int
    problem: str | None = None


class _NotFinite(Exception):
    """A product with the Hessian is NaN or infinite."""


def curvature(product: Product, size: int, *, seed: int = 0) -> Curvature:
    """Return the extreme eigenvalues of a symmetric matrix of which only products with vectors are known.

    No global random generator is drawn from.

    Args:
        product: of the matrix with a 1-D float64 vector; the result may be of any precision.
        size: of the matrix, at least 1.
        seed: of the vector to begin with.
    """
    counted = _Counted(product, size)
    try:
        if size <= _DENSE:
            values = np.linalg.eigvalsh(counted.dense())
            return Curvature(largest=float(values[-1]), smallest=float(values[0]), products=counted.count)
        start = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double().numpy()
        largest = _end("LA", counted, size, start)
        if largest is None:
            return _not_converged(None, counted)
        # shifted, all eigenvalues are <= 0: the smallest is found to a share of the spectrum's width, however near to 0
        smallest = _end("SA", lambda v: counted(v) - largest * v, size, start)
        if smallest is None:
            return _not_converged(largest, counted)
        return Curvature(largest=largest, smallest=smallest + largest, products=counted.count)
    except _NotFinite:
        problem = "a product with the Hessian is not finite"
        return Curvature(largest=None, smallest=None, products=counted.count, problem=problem)


def _not_converged(largest: float | None, counted: _Counted) -> Curvature:
    problem = f"the Lanczos method has not converged within {counted.count} products"
    return Curvature(largest=largest, smallest=None, products=counted.count, problem=problem)


def _end(which: str, product: Any, size: int, start: NDArray[np.float64]) -> float | None:
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    try:
        found = eigsh(operator, k=1, which=which, tol=TOLERANCE, v0=start, maxiter=_RESTARTS, return_eigenvectors=False)
    except ArpackNoConvergence:
        return None
    return float(found[0])


class _Counted:
    """The product on numpy's arrays, counted."""

    def __init__(self, product: Product, size: int) -> None:
        self._product, self._size, self.count = product, size, 0

    def __call__(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        self.count += 1
        found = self._product(torch.from_numpy(np.array(vector, dtype=np.float64).reshape(-1)))
        array: NDArray[np.float64] = found.double().cpu().numpy()
        if not np.isfinite(array).all():
            raise _NotFinite
        return array

    def dense(self) -> NDArray[np.float64]:
        matrix = np.stack([self(row) for row in np.eye(self._size)])
        return np.asarray((matrix + matrix.T) / 2)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What the largest eigenvalue is compared with.

    Args:
        optimizer: its class and the arguments that matter.
        value: the largest eigenvalue at which steps of the optimizer do not oscillate; None: not known.
        rule: as a formula, or why there is none.
    """

    optimizer: str
    value: float | None
    rule: str


def stability_limit(name: str, groups: Sequence[Mapping[str, Any]]) -> Limit:
    """Return the curvature up to which gradient descent is stable: Cohen et al. 2021 (arXiv 2103.00065), section 2.

    On a quadratic of curvature s, gradient descent converges if s is below 2 / rate; with momentum m below
    2 (1 + m) / rate, and with Nesterov's below 2 (1 + m) / (1 + 2 m) / rate. It is exact for the loss of all data
    together; steps on small batches usually stay below it.

    Args:
        name: class of the optimizer.
        groups: its parameter groups, from a checkpoint: from anybody.
    """
    if not groups:
        return Limit(optimizer=name, value=None, rule="none: the checkpoint holds no learning rate of one optimizer")
    rates = {_number(group.get("lr")) for group in groups}
    if name != "SGD":
        return Limit(optimizer=name, value=None, rule=f"none is computed for {name}, only for torch's SGD")
    momenta = {(_number(g.get("momentum", 0)), _number(g.get("dampening", 0)), g.get("nesterov")) for g in groups}
    if len(rates) != 1 or len(momenta) != 1:
        return Limit(optimizer=name, value=None, rule="none: the parameter groups have several rates or momenta")
    (rate,), ((momentum, dampening, nesterov),) = rates, momenta
    if rate is None or momentum is None or rate <= 0 or dampening != 0:
        return Limit(optimizer=name, value=None, rule="none: of a rate above 0, and momentum without dampening, only")
    if not momentum:
        return Limit(optimizer=f"SGD, rate {rate:.3g}", value=2 / rate, rule="2/rate")
    text = f"SGD, rate {rate:.3g}, momentum {momentum:.3g}"
    if nesterov:
        value = 2 * (1 + momentum) / (1 + 2 * momentum) / rate
        return Limit(optimizer=f"{text} (Nesterov)", value=value, rule="2(1+m)/(1+2m)/rate")
    return Limit(optimizer=text, value=2 * (1 + momentum) / rate, rule="2(1+m)/rate")


def _number(value: object) -> float | None:
    """A number of a checkpoint, where it may also be a tensor, or anything."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
