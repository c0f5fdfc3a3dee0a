"""Calls ``training_step`` of a copy of a module, and keeps what it computes: outputs, loss and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stabletrain.runtime.internals.packages import both
from stabletrain.strategies.tensor_parallel_layers import GradientSums


class Computed(NamedTuple):
    """What a call of ``training_step`` has computed.

    Args:
        outputs: floating tensors that the module, or a direct submodule of it, has returned, with their names.
        gradients: of its trained parameters, whole; None: none.
        plain: names of the parameters that are not cut and have a gradient.
    """

    outputs: list[tuple[str, Tensor]]
    gradients: dict[str, Tensor | None]
    plain: list[str]


def compute(
    module: LightningModule, trainer: Trainer, arguments: tuple[Any, ...], sums: GradientSums | None = None
) -> Computed | None:
    """Call ``training_step`` and backward, in evaluation mode, without logging.

    Args:
        module: a copy, which is of no use afterwards.
        trainer: of the fit, which the module may ask.
        arguments: of ``training_step``.
        sums: of the module's gradients.

    Returns:
        None without a loss.
    """
    module.eval()
    if sums is not None:
        sums.attach()
    outputs: list[tuple[str, Tensor]] = []

    def record(name: str) -> Callable[..., None]:
        def keep(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                outputs.append((name, whole_of(tensor)))
            return tensor

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            apply_to_collection(output, Tensor, keep)

        return hook

    for name, each in [(type(module).__name__, module), *module.named_children()]:
        each.register_forward_hook(record(name))
    module.zero_grad()
    with _without_logging(module, trainer), torch.enable_grad():
        result: Any = module.training_step(*arguments)
        loss = result["loss"] if isinstance(result, dict) else result
        if loss is None:
            return None
        outputs.append(("training_step (the loss)", loss.detach()))
        loss.backward()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = {name: None if p.grad is None else whole_of(p.grad) for name, p in trained.items()}
    plain = [name for name, p in trained.items() if p.grad is not None and not isinstance(p, DTensor)]
    return Computed(outputs, gradients, plain)


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


def whole_of(tensor: Tensor) -> Tensor:
    """The values of a tensor, of a cut one those of all ranks."""
    tensor = tensor.detach()
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def size_of(tensor: Tensor) -> float:
    """The largest absolute value; 0 for a tensor without elements."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two elements; equal values, NaN and infinities too, do not differ."""
    differs = (one != other) & ~(one.isnan() & other.isnan())
    return float((one - other).abs()[differs].max()) if bool(differs.any()) else 0.0


def in_double(batch: Any) -> Any:
    """A batch with its floating tensors in double precision."""
    return apply_to_collection(batch, Tensor, lambda t: t.double() if t.is_floating_point() else t)


def first_rows(batch: Any, rows: int) -> Any:
    """The first rows of a batch, if its tensors all have one number of rows; else the batch."""
    sizes: set[int] = set()

    def look(tensor: Tensor) -> Tensor:
        sizes.add(len(tensor) if tensor.ndim else -1)
        return tensor

    apply_to_collection(batch, Tensor, look)
    if len(sizes) != 1 or min(sizes) <= rows:
        return batch
    return apply_to_collection(batch, Tensor, lambda t: t[:rows])
