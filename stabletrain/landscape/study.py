"""Compute the planes and the curvature of a run within a fit that ends before its first step.

A Trainer of its own sets up module and data as for training, and gives the first batches. Nothing is trained.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.landscape.checkpoints import Saved, read_checkpoints, thinned
from stabletrain.landscape.curvature import USUAL_PRODUCTS, curvature, stability_limit
from stabletrain.landscape.objective import Objective, Weights
from stabletrain.landscape.planes import (
    Principal,
    axis,
    frame,
    loss_at,
    loss_grid,
    principal_plane,
    random_direction,
)
from stabletrain.landscape.results import CheckpointLoss, Landscape
from stabletrain.runtime.checkpoints.names import with_own_names
from stabletrain.runtime.internals.micro_batch import MicroBatch, around_micro_batches, not_logging
from stabletrain.runtime.records.diagnosis import first_nonfinite_weight

_MISMATCH = (RuntimeError, KeyError, TypeError, AttributeError, ValueError)
"""What ``load_state_dict`` raises for the weights of another model."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is computed.

    Args:
        resolution: points of a grid along each direction, >= 2.
        batches: of the training loader whose mean loss is computed, >= 1.
        batch_stats: see `Objective`.
        has_curvature: whether to compute eigenvalues of the Hessian, which takes scipy.
        seed: of the random plane.
    """

    resolution: int = 25
    batches: int = 4
    batch_stats: bool = False
    has_curvature: bool = True
    seed: int = 0


Say = Callable[[str], None]


class Studied(BaseException):
    """Ends the fit when all is computed; no `Exception`, which a module might catch."""


class Study(Callback):
    """Gathers batches, then computes everything, and ends the fit by `Studied`.

    Args:
        name: of the run.
        paths: of its checkpoints, in order.
        options: what to compute.
        say: gets a line of text for each part.
        most: checkpoints that are used at most, evenly spaced, >= 1.
    """

    def __init__(self, name: str, paths: Sequence[Path], options: Options, say: Say, *, most: int) -> None:
        self.name, self.paths, self.options, self.say, self.most = name, paths, options, say, most
        self.result: Landscape | None = None
        self._parts: list[MicroBatch] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the micro-batches.

        Raises:
            UserError: if the module calls its optimizers itself, so that it is not known which loss it minimises.
        """
        if not pl_module.automatic_optimization:
            raise UserError(
                f"landscape: {type(pl_module).__name__} steps its optimizers itself (automatic_optimization=False), so "
                "the loss that it minimises is not known; expected a module whose training_step returns the loss"
            )
        trainer.accumulate_grad_batches = self.options.batches + 1  # no step before all batches are there

        def gather(part: MicroBatch) -> Any:
            if not part.has_batch:
                raise UserError(
                    f"landscape: training_step of {type(pl_module).__name__} takes the iterator over the loader "
                    "(dataloader_iter), so its loss cannot be computed again; expected one that takes a batch"
                )
            self._parts.append(part)
            if len(self._parts) == self.options.batches or part.ends_window:
                trainer.accumulate_grad_batches = 1  # by which Lightning divides the loss
                with not_logging(pl_module):
                    self.result = self._compute(trainer, pl_module)
                raise Studied
            return part.forward(_copied(part.batch))

        around_micro_batches(trainer, gather)

    def _compute(self, trainer: Trainer, module: LightningModule) -> Landscape:
        losses = [_loss_of(part, number) for number, part in enumerate(self._parts)]
        objective = Objective(module, losses, batch_stats=self.options.batch_stats)
        if not objective.size:
            raise UserError(f"landscape: {type(module).__name__} has no trained parameters; there is nothing to vary")
        with objective.opened():
            return _Computation(self, objective, module, trainer.optimizers).run()


def _copied(batch: Any) -> Any:
    """A batch that training_step may change in place, as by ``batch.pop("labels")``; itself if it cannot be copied."""
    with suppress(Exception):
        return copy.deepcopy(batch)
    return batch


def _loss_of(part: MicroBatch, number: int) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        loss = part.forward(_copied(part.batch)).closure_loss
        if loss is None or loss.numel() != 1:
            got = "None" if loss is None else f"a tensor of shape {tuple(loss.shape)}"
            raise UserError(f"landscape: expected a loss from training_step, got {got} at batch {number}")
        return loss.reshape(())  # type: ignore[no-any-return]

    return compute


@dataclass(frozen=True)
class _Point:
    """The weights of a checkpoint on the CPU, its buffers and frozen parameters, and its result."""

    weights: Weights
    fixed: Weights
    result: CheckpointLoss


def _is_unsteady(result: Landscape) -> bool:
    """Whether the loss at the last weights differs between the first evaluation and one within a plane."""
    first, found = result.centre.loss, [result.centre.loss_in_plane]
    for grid in (result.random, result.path):
        if grid is not None and 0.0 in grid.xs and 0.0 in grid.ys:
            found.append(grid.losses[grid.ys.index(0.0)][grid.xs.index(0.0)])
    return any(
        each is not None and math.isfinite(each) and not math.isclose(each, first, rel_tol=1e-3, abs_tol=1e-6)
        for each in found
    )


class _Computation:
    def __init__(
        self, study: Study, objective: Objective, module: LightningModule, optimizers: Sequence[Optimizer]
    ) -> None:
        self.options, self.say, self.name = study.options, study.say, study.name
        self.paths, self.most = study.paths, study.most
        self.objective, self.module, self.optimizers = objective, module, optimizers
        self.notes: list[str] = []

    def run(self) -> Landscape:
        points = self._read()
        plane = principal_plane([each.weights for each in points])
        if plane is None:
            count = len(points)
            why = "there is one checkpoint" if count == 1 else f"{count} checkpoints lie on a line"
            self.notes.append(
                f"no plane of the checkpoints: {why}; it takes three or more, for which "
                "plugins.checkpoints.keep_last=null keeps all"
            )
        options, objective = self.options, self.objective
        has_curvature = options.has_curvature
        self._announce(len(points), plane is not None, points)
        result = Landscape(
            name=self.name,
            parameters=objective.size,
            batches=len(objective.losses),
            batch_stats=options.batch_stats,
            seed=options.seed,
            checkpoints=[each.result for each in points],
            notes=self.notes,
        )
        self._planes(result, points, plane)
        if has_curvature:
            self._curvature(points)
        if _is_unsteady(result):
            self.notes.append(
                "the loss is another one each time it is computed at the same weights: training_step keeps a state "
                "that is no tensor, such as a count of its calls; pictures and eigenvalues are wrong by as much"
            )
        result.by_differences, result.passes = objective.by_differences, objective.passes
        return result

    def _read(self) -> list[_Point]:
        """The weights of the checkpoints by step; of two of one step the one that was written later."""
        by_step: dict[int, _Point] = {}
        for saved in self._usable(self._chosen()):
            weights = [each.cpu() for each in self.objective.weights()]
            fixed = [each.cpu() for each in self.objective.fixed()]
            limit = stability_limit(*self._groups(saved.content))
            result = CheckpointLoss(step=saved.step, name=saved.name, loss=math.nan, limit=limit)
            by_step[saved.step] = _Point(weights, fixed, result)
        if not by_step:
            raise UserError(f"landscape: none of the checkpoints of {self.name} can be used: {'; '.join(self.notes)}")
        return [by_step[step] for step in sorted(by_step)]

    def _chosen(self) -> list[Path]:
        """Some of the checkpoints; the last of them can be used, since it is the centre of the planes."""
        paths = list(self.paths)
        while paths and not any(True for _ in self._usable(paths[-1:])):
            paths.pop()
        chosen = thinned(paths, self.most)
        if len(chosen) < len(paths):
            count = len(self.paths)
            self.say(f"{len(chosen)} of the {count} checkpoints, evenly spaced; more with --checkpoints {count}")
        return chosen

    def _usable(self, paths: Sequence[Path]) -> Iterator[Saved]:
        """The checkpoints that can be read, and have finite weights; the module has those of the present one."""
        for saved in read_checkpoints(paths, self.notes):
            self._load(saved)
            if (name := first_nonfinite_weight(self.module)) is None:
                yield saved
            else:
                self.notes.append(f"{saved.name} is left out: its weights are not finite ({name})")

    def _load(self, saved: Saved) -> None:
        content = dict(saved.content)
        self.module.on_load_checkpoint(content)  # it may rename the weights
        try:
            state = with_own_names(content["state_dict"], self.module)
            self.module.load_state_dict(state, strict=self.module.strict_loading)
        except _MISMATCH as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(
                f"landscape: {saved.name} is the checkpoint of another model than that of run.yaml: "
                f"{' '.join(lines[1:2] or lines[:1])}; name the run that wrote it, or move it away"
            ) from error

    def _groups(self, content: Mapping[str, Any]) -> tuple[str, list[Mapping[str, Any]]]:
        """The class of the optimizer, and the parameter groups of a checkpoint."""
        if len(self.optimizers) != 1:
            return f"{len(self.optimizers)} optimizers", []
        kind, states = type(self.optimizers[0]), content.get("optimizer_states")
        if kind.__module__.startswith("lightning."):  # its stand-in for none
            return "a module without an optimizer", []
        name = "SGD" if kind is torch.optim.SGD else f"{kind.__module__}.{kind.__name__}"
        first = states[0] if isinstance(states, list) and states else None
        groups = first.get("param_groups") if isinstance(first, Mapping) else None
        found = [each for each in groups if isinstance(each, Mapping)] if isinstance(groups, list) else []
        return name, found

    def _announce(self, count: int, has_plane: bool, points: Sequence[_Point]) -> None:
        """Say what it will cost, measured by the losses of the checkpoints."""
        options, batches = self.options, len(self.objective.losses)
        grid = options.resolution**2 * batches
        parts = [
            f"{options.resolution} x {options.resolution} points x {batches} batches = {grid} for the random plane"
        ]
        total = grid
        if has_plane:
            parts.append(f"{grid + count * batches} for the plane of {count} checkpoints")
            total += grid + count * batches
        lines = [f"forward passes: {', '.join(parts)}, {count * batches} for the losses of the checkpoints"]
        if options.has_curvature:
            products = count * USUAL_PRODUCTS * batches
            lines.append(
                f"curvature: usually {USUAL_PRODUCTS} Hessian-vector products at each checkpoint x {batches} batches = "
                f"{products} passes forward and back, twice"
            )
            total += 5 * products  # taken as five forward passes: an estimate
        for line in lines:
            self.say(line)
        begin = time.perf_counter()
        for each in points:
            self.objective.move(each.weights, each.fixed)
            each.result.loss = self.objective.loss()
        seconds = (time.perf_counter() - begin) / (count * batches) * total
        self.say(f"that takes about {max(1, round(seconds))} s here")

    def _planes(self, result: Landscape, points: Sequence[_Point], plane: Principal | None) -> None:
        """The losses on both planes, at the last checkpoint's buffers."""
        objective, options, last = self.objective, self.options, points[-1]
        objective.move(last.weights, last.fixed)
        centre = objective.weights()
        generator = torch.Generator().manual_seed(options.seed)
        first, second = random_direction(centre, generator), random_direction(centre, generator)
        xs = axis(-1.0, 1.0, options.resolution)
        result.random = loss_grid(objective, centre, first, second, xs, xs)
        if plane is None:
            return
        first, second = (
            [d.to(w) for d, w in zip(direction, centre, strict=True)] for direction in (plane.first, plane.second)
        )
        result.shares = plane.shares
        result.path = loss_grid(objective, centre, first, second, *frame(plane.path, options.resolution))
        for each, place in zip(points, plane.path, strict=True):
            each.result.place = place
            each.result.loss_in_plane = loss_at(objective, centre, first, second, *place)

    def _curvature(self, points: Sequence[_Point]) -> None:
        for each in points:
            self.objective.move(each.weights, each.fixed)
            each.result.curvature = found = curvature(self.objective.product, self.objective.size)
            if found.problem is not None:
                self.notes.append(f"curvature at step {each.result.step}: {found.problem}")
