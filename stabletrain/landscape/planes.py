"""Planes in the space of weights, and the loss on a grid of their points.

A plane is given by a centre and two directions; a direction is a list of tensors, one for each trained parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabletrain.landscape.objective import Objective, Weights


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The loss on a plane.

    Args:
        xs: coordinates along the first direction.
        ys: along the second.
        losses: ``losses[row][column]`` at ``(xs[column], ys[row])``; may be NaN or infinite.
    """

    xs: list[float]
    ys: list[float]
    losses: list[list[float]]

    @property
    def finite(self) -> list[float]:
        """The finite losses, in order."""
        return sorted(loss for row in self.losses for loss in row if math.isfinite(loss))

    @property
    def overflows(self) -> int:
        """The number of points where the loss is not finite."""
        return sum(map(len, self.losses)) - len(self.finite)


@dataclass(frozen=True, kw_only=True)
class Principal:
    """The plane in which checkpoints differ most.

    Args:
        first: unit direction of the largest variance.
        second: that of the second largest, orthogonal to it.
        path: coordinates of each checkpoint; the last one is at (0, 0).
        shares: of the variance about the last checkpoint, along each direction, 0 to 1.
    """

    first: list[Tensor]
    second: list[Tensor]
    path: list[tuple[float, float]]
    shares: tuple[float, float]


def random_direction(weights: Weights, generator: torch.Generator) -> list[Tensor]:
    """A filter-normalised random direction: Li et al. 2018 (arXiv 1712.09913), section 4.

    Each row of a weight (filter of a convolution, unit of a layer, vector of an embedding) gets a normal direction of
    the row's own norm, since a network with ReLU or normalisation is the same function if a row is scaled up and the
    next layer down. Vectors (biases, scales of norms) stay as they are: their direction is zero.

    Args:
        weights: the centre.
        generator: on the CPU, so that a device does not change the direction.
    """
    found = []
    for weight in weights:
        if weight.ndim < 2:
            found.append(torch.zeros_like(weight))
            continue
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
        length, wanted = drawn.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1)
        found.append(drawn * (wanted / (length + 1e-10)).view(-1, *[1] * (weight.ndim - 1)))
    return found


def principal_plane(points: Sequence[Weights]) -> Principal | None:
    """The plane through the last point that contains most of the variance of the points about it.

    Args:
        points: weights of the checkpoints in their order, at least one.

    Returns:
        None if the points lie on a line, as two always do, or are all the same.
    """
    last = points[-1]
    count = len(points) - 1
    gram = torch.zeros(count, count, dtype=torch.float64)
    for index in range(len(last)):
        rows = _differences(points, index)
        gram += rows @ rows.T
    if count < 2:
        return None
    values, vectors = torch.linalg.eigh(gram)
    total = float(values.clamp(min=0).sum())
    if not total or float(values[-2]) < 1e-10 * total:
        return None
    chosen, scales = vectors[:, [-1, -2]], values[[-1, -2]].sqrt()
    directions: list[list[Tensor]] = [[], []]
    for index, weight in enumerate(last):
        rows = _differences(points, index)
        for number, direction in enumerate((chosen.T @ rows) / scales[:, None]):
            directions[number].append(direction.view(weight.shape).to(weight))
    path = [(float(x), float(y)) for x, y in chosen * scales] + [(0.0, 0.0)]
    shares = (float(values[-1]) / total, float(values[-2]) / total)
    return Principal(first=directions[0], second=directions[1], path=path, shares=shares)


def _differences(points: Sequence[Weights], index: int) -> Tensor:
    """One tensor of each point but the last, minus that of the last, as rows in float64."""
    last = points[-1][index].double()
    rows = [(each[index].double() - last).reshape(-1) for each in points[:-1]]
    return torch.stack(rows) if rows else last.new_zeros(0, last.numel())


def axis(low: float, high: float, resolution: int) -> list[float]:
    """Evenly spaced coordinates.

    Args:
        low: the first.
        high: the last.
        resolution: how many, at least 2.
    """
    return [float(each) for each in torch.linspace(low, high, resolution, dtype=torch.float64)]


def frame(path: Sequence[tuple[float, float]], resolution: int) -> tuple[list[float], list[float]]:
    """The coordinates of a grid that holds a path with a quarter of its extent around it.

    Args:
        path: at least two points.
        resolution: points along each direction.
    """
    lows, highs = [min(each) for each in zip(*path, strict=True)], [max(each) for each in zip(*path, strict=True)]
    margin = 0.25 * max(high - low for low, high in zip(lows, highs, strict=True))
    xs, ys = (axis(low - margin, high + margin, resolution) for low, high in zip(lows, highs, strict=True))
    return xs, ys


def loss_at(objective: Objective, centre: Weights, first: Weights, second: Weights, x: float, y: float) -> float:
    """The loss at one point of a plane.

    Args:
        objective: opened.
        centre: weights at (0, 0).
        first: direction of x.
        second: direction of y.
        x: coordinate.
        y: coordinate.
    """
    objective.move([w + x * a + y * b for w, a, b in zip(centre, first, second, strict=True)])
    return objective.loss()


def loss_grid(
    objective: Objective, centre: Weights, first: Weights, second: Weights, xs: Sequence[float], ys: Sequence[float]
) -> Grid:
    """The loss at all points of a grid; afterwards the weights are those of the centre.

    Args:
        objective: opened.
        centre: weights at (0, 0).
        first: direction of x.
        second: direction of y.
        xs: coordinates.
        ys: coordinates.
    """
    losses = [[loss_at(objective, centre, first, second, x, y) for x in xs] for y in ys]
    objective.move(centre)
    return Grid(xs=list(xs), ys=list(ys), losses=losses)
