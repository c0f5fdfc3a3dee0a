"""What `stabletrain.landscape.study` has found, and its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from stabletrain.landscape.curvature import Curvature, Limit
from stabletrain.landscape.planes import Grid


@dataclass(kw_only=True)
class CheckpointLoss:
    """What was computed at a checkpoint.

    Args:
        step: applied steps.
        name: of its file or folder.
        loss: at its own weights and buffers.
        place: coordinates of its projection on the plane of the checkpoints; None without one.
        loss_in_plane: at that point; it differs from ``loss`` where the path leaves the plane.
        curvature: eigenvalues of the Hessian; None: not computed.
        limit: what the largest one is compared with.
    """

    step: int
    name: str
    loss: float
    place: tuple[float, float] | None = None
    loss_in_plane: float | None = None
    curvature: Curvature | None = None
    limit: Limit | None = None


@dataclass(kw_only=True)
class Landscape:
    """The loss around the weights of a run.

    Args:
        name: of the run.
        parameters: number of trained weights.
        batches: of the training loader, of which the loss is the mean.
        batch_stats: whether BatchNorm used the statistics of the batch.
        seed: of the random plane.
        checkpoints: in the order in which they were written; the last one is the centre of the planes.
        random: the loss on the random plane.
        path: that on the plane of the checkpoints; None without one.
        shares: of the checkpoints' variance along the two directions of that plane.
        by_differences: whether the Hessian was applied by differences of gradients.
        passes: forward passes.
        notes: sentences about what was left out.
    """

    name: str
    parameters: int
    batches: int
    batch_stats: bool
    seed: int
    checkpoints: list[CheckpointLoss]
    random: Grid | None = None
    path: Grid | None = None
    shares: tuple[float, float] | None = None
    by_differences: bool = False
    passes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def centre(self) -> CheckpointLoss:
        """The last checkpoint."""
        return self.checkpoints[-1]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; losses in the unit of the module's own loss."""
        return asdict(self)
