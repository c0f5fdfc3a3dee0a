"""Both ends of the Hessian's spectrum, and the limits that the largest eigenvalue is compared with."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabletrain.landscape import curvature as module
from stabletrain.landscape.curvature import curvature, stability_limit
from stabletrain.landscape.objective import Objective

pytest.importorskip("scipy")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_ends_of_the_spectrum_are_those_of_the_dense_hessian(sign: float) -> None:
    """Bug: power iteration, which returns the eigenvalue of the largest magnitude, also if it is negative."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = 2 * torch.randn(64, 6)
    labels = torch.randint(3, (64,))
    objective = Objective(net, [lambda: sign * F.cross_entropy(net(inputs), labels)])
    with objective.opened():
        matrix = torch.stack([objective.product(row) for row in torch.eye(objective.size)])
        random = torch.get_rng_state(), np.random.get_state()[1].tolist()
        found = curvature(objective.product, objective.size)
        assert torch.equal(random[0], torch.get_rng_state())
        assert random[1] == np.random.get_state()[1].tolist()
    values = torch.linalg.eigvalsh((matrix + matrix.T).double() / 2)
    assert (abs(float(values[0])) > float(values[-1])) == (sign < 0)
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-3)
    assert found.smallest == pytest.approx(float(values[0]), abs=1e-3 * float(values[-1] - values[0]))
    assert found.problem is None
    assert found.products < 200


@pytest.mark.parametrize("size", [1, 5, 33])
def test_matrices_that_are_smaller_than_the_methods_basis(size: int) -> None:
    """Bug: scipy needs more rows than eigenvalues and vectors of its basis."""
    values = torch.linspace(-3, 2, size, dtype=torch.float64)
    found = curvature(lambda v: values * v, size)
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-3)
    assert found.smallest == pytest.approx(-3.0, rel=1e-3)


def test_what_is_not_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a NaN as eigenvalue, an endless iteration, a traceback of scipy."""

    def broken(vector: Tensor) -> Tensor:
        return vector * torch.nan

    found = curvature(broken, 50)
    assert (found.largest, found.smallest, found.problem) == (None, None, "a product with the Hessian is not finite")
    monkeypatch.setattr(module, "_RESTARTS", 1)
    values = torch.linspace(-1, 1, 5000, dtype=torch.float64)
    found = curvature(lambda v: values * v, 5000)
    assert found.largest is None
    assert found.problem == f"the Lanczos method has not converged within {found.products} products"


@pytest.mark.parametrize(
    ("group", "value", "rule"),
    [
        ({"lr": 0.1}, 20.0, "2/rate"),
        ({"lr": torch.tensor(0.1), "momentum": 0.9}, 38.0, "2(1+m)/rate"),
        ({"lr": 0.1, "momentum": 0.9, "nesterov": True}, 38.0 / 2.8, "2(1+m)/(1+2m)/rate"),
        ({"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, None, None),
        ({"lr": 0.0}, None, None),
        ({"lr": "fast"}, None, None),
        ({}, None, None),
    ],
)
def test_limits_of_sgd(group: dict[str, Any], value: float | None, rule: str | None) -> None:
    """Bug: the limit without momentum for SGD with momentum; a traceback for what a checkpoint may hold."""
    found = stability_limit("SGD", [group, group])
    assert found.value == (None if value is None else pytest.approx(value, rel=1e-6))
    assert rule is None or found.rule == rule


def test_heavy_ball_is_unstable_just_above_its_limit() -> None:
    """Bug: a wrong formula. Steps on a quadratic shrink below the limit and grow above it."""
    for nesterov in (False, True):
        limit = stability_limit("SGD", [{"lr": 0.1, "momentum": 0.8, "nesterov": nesterov}]).value
        assert limit is not None
        ends = []
        for factor in (0.99, 1.01):
            weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
            optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.8, nesterov=nesterov)
            for _ in range(1500):
                weight.grad = factor * limit * weight.detach()
                optimizer.step()
            ends.append(abs(weight.item()))
        assert ends[0] < 1e-3
        assert ends[1] > 1e3


def test_other_optimizers_have_no_limit() -> None:
    """Bug: 2/rate for Adam, whose rate means something else."""
    assert stability_limit("torch.optim.adamw.AdamW", [{"lr": 0.1}]).value is None
    assert stability_limit("SGD", [{"lr": 0.1}, {"lr": 0.2}]).value is None
    assert "no learning rate" in stability_limit("SGD", []).rule
