"""Compares a module that a plan has cut with the whole module, on a few rows of a batch, before the first step.

Both are copies, in double precision if the module allows it, without dropout: nothing of the training is touched.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.records.event_log import logger
from stabletrain.strategies.tensor_parallel_layers import GradientSums, cut
from stabletrain.strategies.tensor_parallel_plan import Assignment

TOLERANCE = 1e-5
"""Largest difference of an element, relative to the largest element of its tensor; of outputs below 1, absolute."""

_ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-5}
"""What gradients may differ by besides, relative to the largest gradient: those that are sums of terms that cancel."""

_ROWS = 2


class _Computed(NamedTuple):
    """What a call of ``training_step`` has computed.

    Args:
        outputs: floating tensors that the module, or a direct submodule of it, has returned, with their names.
        gradients: of its trained parameters, whole; None: none.
        plain: names of the parameters that are not cut and have a gradient.
    """

    outputs: list[tuple[str, Tensor]]
    gradients: dict[str, Tensor | None]
    plain: list[str]


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
        problem, message = None, None
        with rng.preserved(), torch.autocast(module.device.type, enabled=False):
            self._take_weights(module)
            self._same_batch(arguments[0])
            expected, repeat = self._reference(trainer, arguments)
            if expected is None:
                return False
            with contextlib.ExitStack() as stack:
                sharded = copy.deepcopy(repeat.module)
                cut(sharded, self._assigned, self._mesh)
                group = self._mesh.get_group()
                sums = GradientSums((sharded.get_parameter(n), [group], 1) for n in self._assigned.partial)
                stack.callback(sums.detach)
                try:
                    got = _compute(sharded, trainer, repeat.arguments, sums)
                    assert got is not None
                    added = {name: self._sum(got.gradients[name]) for name in got.plain}
                    problem, message = self._differences(expected, got, added, repeat.dtype)
                except Exception as error:
                    problem = (
                        f"the cut module fails in training_step ({type(error).__name__}: {error}). Layers between a "
                        "colwise and a rowwise layer get this rank's part of a tensor: sizes in reshape and view must "
                        "be -1, or attributes with the style 'divide'; what mixes torch.Tensor and DTensor uses the "
                        "weight of a cut layer besides its forward"
                    )
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        first = next((each for each in problems if each), None)
        if first:
            raise UserError(
                f"{self._owner}: the plan is wrong: {first} (config key strategy.strategy.plan; docs/tensor_parallel.md)"
            )
        if dist.get_rank() == 0 and message:
            logger.info("%s: the plan was checked on a part of the first batch: %s", self._owner, message)
        return True

    def _take_weights(self, module: LightningModule) -> None:
        """Give the copy the weights of the module as they are now: a checkpoint may have been loaded."""
        now = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, tensor in [*self._whole.named_parameters(), *self._whole.named_buffers()]:
                value = now[name]
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
        differ: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(differ, len(set(found)) > 1)
        if any(differ):
            raise UserError(
                f"{self._owner}: the processes of a tensor-parallel group got different first batches, and compute "
                "each step together. Let Lightning set the sampler (use_distributed_sampler=True), or let the data "
                "depend on trainer.distributed_sampler_kwargs['rank'], not on the process's rank; random augmentation "
                "in data-loader workers needs a seed that does not depend on the rank"
            )

    def _reference(self, trainer: Trainer, arguments: tuple[Any, ...]) -> tuple[_Computed | None, _Attempt]:
        """What the whole module computes, and how it was called: as little of the batch as it takes."""
        few = _first_rows(arguments[0], _ROWS)
        attempts: list[Callable[[], _Attempt]] = [
            lambda: _Attempt(copy.deepcopy(self._whole).double(), (_double(few), *arguments[1:]), torch.float64),
            lambda: _Attempt(copy.deepcopy(self._whole), (few, *arguments[1:]), torch.float32),
            lambda: _Attempt(copy.deepcopy(self._whole), arguments, torch.float32),
        ]
        for i, make in enumerate(attempts):
            each = make()
            unused = copy.deepcopy(each.module)
            try:
                return _compute(each.module, trainer, each.arguments), _Attempt(unused, *each[1:])
            except Exception as error:
                if i == len(attempts) - 1:
                    raise UserError(
                        f"{self._owner}: the check of the plan cannot call training_step on a copy of "
                        f"{type(self._whole).__name__} ({type(error).__name__}: {error}). Use check=False (config key "
                        "strategy.strategy.check) if you have compared the cut module with the whole one yourself"
                    ) from error
        raise AssertionError("unreachable")

    def _sum(self, gradient: Tensor | None) -> Tensor:
        """A gradient added up over the group."""
        assert gradient is not None
        total = gradient.clone()
        dist.all_reduce(total, group=self._mesh.get_group())
        return total

    def _differences(
        self, expected: _Computed, got: _Computed, added: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[str | None, str]:
        """The first difference that is too large, if there is one; and how large differences are."""
        largest_output = 0.0
        if [name for name, _ in expected.outputs] != [name for name, _ in got.outputs]:
            return "it calls other submodules than the whole module", ""
        for (name, whole), (_, mine) in zip(expected.outputs, got.outputs, strict=True):
            if whole.shape != mine.shape:
                return f"the output of {name} has the shape {tuple(mine.shape)}, expected {tuple(whole.shape)}", ""
            difference = _distance(whole, mine)
            largest_output = max(largest_output, difference)
            if not difference <= TOLERANCE * max(1.0, _size(whole)):
                return (
                    f"the output of {name} differs from that of the whole module by {difference:.3g}, expected at most "
                    f"{TOLERANCE}. A fused layer of q, k and v needs the style 'colwise:3', the number of heads the "
                    "style 'divide', and each colwise layer a rowwise one after it"
                ), ""
        scale = max((_size(g) for g in expected.gradients.values() if g is not None), default=0.0)
        worst = 0.0
        for name, whole_gradient in expected.gradients.items():
            mine_gradient = got.gradients[name]
            if whole_gradient is None or mine_gradient is None:
                if whole_gradient is not mine_gradient:
                    return f"only one of both modules has a gradient of {name}", ""
                continue
            difference = _distance(whole_gradient, mine_gradient)
            if not difference <= TOLERANCE * _size(whole_gradient) + _ROUNDING[dtype] * scale:
                return self._gradient_problem(name, whole_gradient, mine_gradient, difference, added.get(name)), ""
            worst = max(worst, difference)
        return None, f"outputs agree within {largest_output:.1g}, gradients within {worst:.1g}"

    def _gradient_problem(
        self, name: str, whole: Tensor, mine: Tensor, difference: float, added: Tensor | None
    ) -> str:
        found = (
            f"the gradient of {name} differs from that of the whole module by {difference:.3g}, where its largest "
            f"element is {_size(whole):.3g}"
        )
        owner = name.rpartition(".")[0] or name
        if name in self._assigned.partial and _distance(whole, mine / self._mesh.size()) <= 1e-3 * _size(whole):
            return f"{found}: it is whole on each rank already. Remove the style 'partial' of {owner}"
        if added is not None and _distance(whole, added) <= 1e-3 * _size(whole):
            return f"{found}: each rank's gradient covers its part only. Add {owner!r}: 'partial' to the plan"
        return found


class _Attempt(NamedTuple):
    """A module that is called, with which arguments, and the precision of the comparison."""

    module: LightningModule
    arguments: tuple[Any, ...]
    dtype: torch.dtype


def _compute(
    module: LightningModule, trainer: Trainer, arguments: tuple[Any, ...], sums: GradientSums | None = None
) -> _Computed | None:
    """Call ``training_step`` and backward; None without a loss."""
    module.eval()
    if sums is not None:
        sums.attach()
    outputs: list[tuple[str, Tensor]] = []

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            apply_to_collection(output, Tensor, lambda t: outputs.append((name, _whole(t))) if t.is_floating_point() else t)

        return hook

    for name, each in [(type(module).__name__, module), *module.named_children()]:
        each.register_forward_hook(record(name))
    module.zero_grad()
    with _without_logging(module, trainer), torch.enable_grad():
        result = module.training_step(*arguments)
        loss = result["loss"] if isinstance(result, dict) else result
        if loss is None:
            return None
        outputs.append(("training_step (the loss)", loss.detach()))
        loss.backward()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = {name: None if p.grad is None else _whole(p.grad) for name, p in trained.items()}
    plain = [name for name, p in trained.items() if p.grad is not None and not isinstance(p, DTensor)]
    return _Computed(outputs, gradients, plain)


@contextlib.contextmanager
def _without_logging(module: LightningModule, trainer: Trainer) -> Iterator[None]:
    """Within it, copies of a module know the trainer and log nothing."""
    kinds = both(LightningModule)
    for each in module.modules():
        if isinstance(each, kinds):
            each.log = each.log_dict = _log_nothing  # type: ignore[method-assign]
    module.trainer = trainer
    yield
    module.trainer = None


def _log_nothing(*_: Any, **__: Any) -> None: ...


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _size(tensor: Tensor) -> float:
    """The largest absolute value; 0 for a tensor without elements."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two elements; equal values, NaN and infinities too, do not differ."""
    differs = (one != other) & ~(one.isnan() & other.isnan())
    return float((one - other).abs()[differs].max()) if bool(differs.any()) else 0.0


def _double(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, lambda t: t.double() if t.is_floating_point() else t)


def _first_rows(batch: Any, rows: int) -> Any:
    """The first rows of a batch, if its tensors all have one number of rows; else the batch."""
    sizes: set[int] = set()

    def look(tensor: Tensor) -> Tensor:
        sizes.add(len(tensor) if tensor.ndim else -1)
        return tensor

    apply_to_collection(batch, Tensor, look)
    if len(sizes) != 1 or min(sizes) <= rows:
        return batch
    return apply_to_collection(batch, Tensor, lambda t: t[:rows])
