"""Compares a module that a plan has cut with the whole module, on a few rows of a batch, before the first step.

Both are copies, in double precision if the module allows it, without dropout: nothing of the training is touched.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.runtime.records.event_log import logger
from stabletrain.strategies.tensor_parallel_compute import Computed, compute, distance, first_rows, in_double, size_of
from stabletrain.strategies.tensor_parallel_layers import GradientSums, cut
from stabletrain.strategies.tensor_parallel_plan import Assignment

T = TypeVar("T")

TOLERANCE = 1e-5
"""Largest difference of an element, relative to the largest element of its tensor; of outputs below 1, absolute."""

_ROUNDING = {torch.float64: 1e-7, None: 1e-5}
"""What gradients may differ by besides, relative to the largest gradient: those that are sums of terms that cancel."""

_ROWS = 2

UNCHECKED = (
    "Use check=False (config key strategy.strategy.check) if you have compared the cut module with the whole one "
    "yourself"
)
"""What to do if a plan cannot be checked."""


class PlanCheck:
    """Compares a cut module with the whole one.

    Args:
        whole: a copy of the module, from before it was cut; its weights are replaced by those at the first step.
        assigned: how it is cut.
        mesh: over which.
        owner: name of the strategy's class, for messages.
    """

    def __init__(self, whole: LightningModule, assigned: Assignment, mesh: DeviceMesh, owner: str) -> None:
        self._whole, self._assigned, self._mesh, self._owner = whole, assigned, mesh, owner

    def run(self, module: LightningModule, trainer: Trainer, arguments: tuple[Any, ...]) -> bool:
        """Compare, on all ranks; return whether there was a loss to compare.

        Args:
            module: the cut module that is trained; it is not changed.
            trainer: of the fit.
            arguments: of ``training_step``: the batch, and its number if the module takes it.

        Raises:
            UserError: on all ranks, if outputs or gradients differ on any.
        """
        problem, message = None, ""
        with rng.preserved(), torch.autocast(module.device.type, enabled=False):
            self._take_weights(module)
            self._same_batch(arguments[0])
            expected, call = self._reference(trainer, arguments)
            if not all(_gathered(expected is not None)):
                return False
            assert expected is not None
            try:
                got = self._cut_module(trainer, call)
                assert got is not None
                added = {name: self._sum(got.gradients[name]) for name in got.plain}
                problem, message = self._differences(expected, got, added, call.dtype)
            except Exception as error:
                problem = (
                    f"the cut module fails in training_step ({type(error).__name__}: {error}). Layers between a "
                    "colwise and a rowwise layer get this rank's part of a tensor: sizes in reshape and view must be "
                    "-1, or attributes with the style 'divide'; what mixes torch.Tensor and DTensor uses the weight of "
                    "a cut layer besides its forward"
                )
        first = next((each for each in _gathered(problem) if each), None)
        if first:
            raise UserError(
                f"{self._owner}: the plan is wrong: {first} (config key strategy.strategy.plan; "
                "docs/tensor_parallel.md)"
            )
        if dist.get_rank() == 0:
            logger.info("%s: the plan was checked on a part of the first batch: %s", self._owner, message)
        return True

    def _copy(self, dtype: torch.dtype | None) -> LightningModule:
        """A copy of the whole module, in another precision if one is given."""
        mesh = self._whole.device_mesh
        copied = copy.deepcopy(self._whole, {id(mesh): mesh})
        return copied if dtype is None else copied.to(dtype)

    def _cut_module(self, trainer: Trainer, call: _Call) -> Computed | None:
        """What the cut module computes, on all ranks of the group together."""
        module = self._copy(call.dtype)
        cut(module, self._assigned, self._mesh)
        group = self._mesh.get_group()
        sums = GradientSums((module.get_parameter(name), [group], 1) for name in self._assigned.partial)
        return compute(module, trainer, call.arguments, sums)

    def _take_weights(self, module: LightningModule) -> None:
        """Give the copy the weights of the module as they are now: a checkpoint may have been loaded."""
        now = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, tensor in [*self._whole.named_parameters(), *self._whole.named_buffers()]:
                value = now.get(name)
                if value is not None and value.shape == tensor.shape:
                    tensor.copy_(value.full_tensor() if isinstance(value, DTensor) else value)

    def _same_batch(self, batch: Any) -> None:
        """Refuse ranks of one group that see different batches."""
        digest = hashlib.blake2b()

        def add(tensor: Tensor) -> Tensor:
            digest.update(str((tensor.shape, tensor.dtype)).encode())
            if tensor.layout is torch.strided:
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            return tensor

        apply_to_collection(batch, Tensor, add)
        found: list[bytes] = [b""] * self._mesh.size()
        dist.all_gather_object(found, digest.digest(), group=self._mesh.get_group())
        if any(_gathered(len(set(found)) > 1)):
            raise UserError(
                f"{self._owner}: the processes of a tensor-parallel group got different first batches, but compute "
                "each step together. Call seed_everything before data are made or drawn at random, let data depend on "
                "trainer.distributed_sampler_kwargs['rank'] instead of the process's rank, and let random augmentation "
                "in data-loader workers not depend on the rank"
            )

    def _reference(self, trainer: Trainer, arguments: tuple[Any, ...]) -> tuple[Computed | None, _Call]:
        """What the whole module computes, None if it has no finite loss; and how it was called.

        In double precision and with a few rows, or with as much of the batch as it takes.
        """
        few = (first_rows(arguments[0], _ROWS), *arguments[1:])
        calls = [_Call((in_double(few[0]), *few[1:]), torch.float64), _Call(few, None), _Call(arguments, None)]
        for call in calls:
            try:
                found = compute(self._copy(call.dtype), trainer, call.arguments)
            except Exception as error:
                problem = error
                continue
            is_finite = found is not None and bool(found.outputs[-1][1].isfinite().all())
            return found if is_finite else None, call
        raise UserError(
            f"{self._owner}: the check of the plan cannot call training_step on a copy of {type(self._whole).__name__} "
            f"({type(problem).__name__}: {problem}). {UNCHECKED}"
        ) from problem

    def _sum(self, gradient: Tensor | None) -> Tensor:
        """A gradient added up over the group."""
        assert gradient is not None
        total = gradient.clone()
        dist.all_reduce(total, group=self._mesh.get_group())
        return total

    def _differences(
        self, expected: Computed, got: Computed, added: dict[str, Tensor], dtype: torch.dtype | None
    ) -> tuple[str | None, str]:
        """The first difference that is too large, if there is one; and how large differences are."""
        largest_output = 0.0
        if [name for name, _ in expected.outputs] != [name for name, _ in got.outputs]:
            return "it calls other submodules than the whole module", ""
        for (name, whole), (_, mine) in zip(expected.outputs, got.outputs, strict=True):
            if whole.shape != mine.shape:
                return f"the output of {name} has the shape {tuple(mine.shape)}, expected {tuple(whole.shape)}", ""
            difference = distance(whole, mine)
            largest_output = max(largest_output, difference)
            if not difference <= TOLERANCE * max(1.0, size_of(whole)):
                return (
                    f"the output of {name} differs from that of the whole module by {difference:.3g}, expected at most "
                    f"{TOLERANCE}. A fused layer of q, k and v needs the style 'colwise:3', the number of heads the "
                    "style 'divide', and each colwise layer a rowwise one after it"
                ), ""
        scale = max((size_of(g) for g in expected.gradients.values() if g is not None), default=0.0)
        worst = 0.0
        for name, whole_gradient in expected.gradients.items():
            mine_gradient = got.gradients[name]
            if whole_gradient is None or mine_gradient is None:
                if whole_gradient is not mine_gradient:
                    return f"only one of both modules has a gradient of {name}", ""
                continue
            difference = distance(whole_gradient, mine_gradient)
            if not difference <= TOLERANCE * size_of(whole_gradient) + _ROUNDING[dtype] * scale:
                return self._gradient_problem(name, whole_gradient, mine_gradient, difference, added.get(name)), ""
            worst = max(worst, difference)
        return None, f"outputs agree within {largest_output:.1g}, gradients within {worst:.1g}"

    def _gradient_problem(self, name: str, whole: Tensor, mine: Tensor, difference: float, added: Tensor | None) -> str:
        found = (
            f"the gradient of {name} differs from that of the whole module by {difference:.3g}, where its largest "
            f"element is {size_of(whole):.3g}"
        )
        owner = name.rpartition(".")[0] or name
        if name in self._assigned.partial and distance(whole, mine / self._mesh.size()) <= 1e-3 * size_of(whole):
            return f"{found}: it is whole on each rank already. Remove the style 'partial' of {owner}"
        if added is not None and distance(whole, added) <= 1e-3 * size_of(whole):
            return f"{found}: each rank's gradient covers its part only. Add {owner!r}: 'partial' to the plan"
        return found


class _Call(NamedTuple):
    """How ``training_step`` is called: its arguments, and the precision of the module; None: its own."""

    arguments: tuple[Any, ...]
    dtype: torch.dtype | None


def _gathered(value: T) -> list[T]:
    """The values of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
