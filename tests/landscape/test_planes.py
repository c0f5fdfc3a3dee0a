"""Directions in the space of weights, the plane of checkpoints, and the loss on a grid."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stabletrain.landscape.objective import Objective
from stabletrain.landscape.pictures import CURVATURE, PLANES, SURFACES, clipping, draw, drawn
from stabletrain.landscape.planes import Grid, axis, frame, loss_grid, principal_plane, random_direction
from stabletrain.landscape.results import CheckpointLoss, Landscape


def test_each_filter_of_a_random_direction_has_the_norm_of_the_weights_filter() -> None:
    """Bugs: the norm of the whole tensor; biases and scales that move; a global generator drawn from."""
    torch.manual_seed(0)
    weights = [5 * torch.randn(7, 3, 2, 2), torch.randn(7), torch.randn(4, 7) * torch.arange(4)[:, None]]
    before = torch.get_rng_state()
    found = random_direction(weights, torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    for number in (0, 2):
        assert torch.allclose(found[number].flatten(1).norm(dim=1), weights[number].flatten(1).norm(dim=1))
    assert not found[1].any()
    assert not found[2][0].any()  # of a row of zeros
    again = random_direction(weights, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_the_plane_of_checkpoints_is_that_of_the_singular_vectors() -> None:
    """Bugs: axes or shares exchanged, a path that does not end at the last checkpoint, directions that are not unit."""
    torch.manual_seed(0)
    points = [[torch.randn(3, 4), torch.randn(5)] for _ in range(6)]
    matrix = torch.stack([torch.cat([each.reshape(-1) for each in point]) for point in points]).double()
    plane = principal_plane(points)
    assert plane is not None
    rows = matrix[:-1] - matrix[-1]
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    shares = sizes.square() / sizes.square().sum()
    assert plane.shares == pytest.approx(shares[:2].tolist(), rel=1e-5)
    directions = [torch.cat([each.reshape(-1) for each in d]).double() for d in (plane.first, plane.second)]
    for number, direction in enumerate(directions):
        assert abs(float(direction @ right[number])) == pytest.approx(1.0, rel=1e-5)
    assert plane.path[-1] == (0.0, 0.0)
    for row, place in zip(rows, plane.path, strict=False):
        assert place == pytest.approx([float(row @ direction) for direction in directions], abs=1e-4)


def test_points_on_a_line_have_no_plane() -> None:
    """Bug: a division by zero, or a plane of rounding errors."""
    torch.manual_seed(0)
    start, step = torch.randn(9), torch.randn(9)
    assert principal_plane([[start]]) is None
    assert principal_plane([[start], [start + step]]) is None
    assert principal_plane([[start], [start], [start]]) is None
    assert principal_plane([[start], [start + step], [start + 2 * step]]) is None


def test_the_middle_of_a_grid_is_the_loss_at_the_weights_and_they_are_put_back() -> None:
    """Bugs: rows and columns exchanged; a centre that is not the weights, as in a known library."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    inputs = torch.randn(5, 2)
    objective = Objective(layer, [lambda: layer(inputs).square().mean()])
    with objective.opened():
        centre, here = objective.weights(), objective.loss()
        first = [torch.ones_like(each) for each in centre]
        second = [torch.full_like(each, -3.0) for each in centre]
        xs, ys = axis(-1, 1, 5), axis(-2, 2, 3)
        grid = loss_grid(objective, centre, first, second, xs, ys)
        assert all(torch.equal(a, b) for a, b in zip(centre, objective.weights(), strict=True))
        assert grid.losses[1][2] == here
        objective.move([each + 1.0 * 1 + 0.0 * -3 for each in centre])
        assert grid.losses[1][4] == pytest.approx(objective.loss())
    assert (len(grid.losses), len(grid.losses[0])) == (3, 5)


def test_the_frame_holds_the_path() -> None:
    """Bug: a path that leaves the picture, or a margin of zero for a path along one direction."""
    xs, ys = frame([(-4.0, 0.0), (2.0, 0.0), (0.0, 0.0)], 7)
    assert (xs[0], xs[-1], ys[0], ys[-1]) == (-5.5, 3.5, -1.5, 1.5)


def grid(*losses: float) -> Grid:
    return Grid(xs=[0.0, 1.0], ys=[0.0, 1.0], losses=[list(losses[:2]), list(losses[2:])])


def test_overflows_are_clipped_and_counted() -> None:
    """Bug: one infinite point, or 1e30, makes the whole picture one colour, and nobody is told."""
    what = drawn(grid(1.0, math.nan, math.inf, 1e30))
    assert what is not None
    assert what.losses == [[1.0, 1e6], [1e6, 1e6]]
    assert (what.is_log, what.clipped) == (True, 3)
    what = drawn(grid(-1.0, 2.0, 3.0, -math.inf))
    assert what is not None
    assert (what.high, what.is_log, what.clipped) == (3.0, False, 1)
    assert drawn(grid(math.nan, math.nan, math.inf, math.nan)) is None


@pytest.mark.parametrize(
    ("losses", "surface"),
    [((1.0, 2.0, 3.0, 4e9), True), ((-2.0,) * 4, False), ((math.nan,) * 4, True)],
)
def test_any_plane_is_drawn_or_said_to_be_empty(losses: tuple[float, ...], surface: bool, tmp_path: Path) -> None:
    """Bug: a flat, negative or empty plane ends in a traceback of matplotlib after all was computed."""
    pytest.importorskip("matplotlib")
    points = [
        CheckpointLoss(step=step, name="$x", loss=1.0, place=(float(step), 0.0), loss_in_plane=losses[0])
        for step in (2, 1, 0)
    ]
    result = Landscape(
        name="a $run", parameters=1, batches=1, batch_stats=False, seed=0, checkpoints=points,
        random=grid(*losses), path=grid(*losses), shares=(0.8, 0.1),
    )  # fmt: skip
    empty = math.isnan(losses[0])
    files = draw(result, tmp_path, surface=surface)
    assert [each.name for each in files] == ([] if empty else [PLANES, SURFACES][: 1 + surface])
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in files)
    assert len(clipping(result)) == (2 if empty or losses[-1] > 1e9 else 0)
    assert CURVATURE not in {each.name for each in files}
