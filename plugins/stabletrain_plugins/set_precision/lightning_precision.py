"""Lightning's own precision plugin, of the Trainer's package, with what ours adds to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from stabletrain.errors import UserError
from stabletrain.runtime.internals.packages import both
from stabletrain.settings import worded


def check_free(trainer: Trainer, name: str) -> None:
    """Raise an error unless the Trainer has the precision plugin that it has by default.

    Args:
        trainer: in ``setup``.
        name: of the precision that is wanted.

    Raises:
        UserError: if the Trainer or its strategy has a precision of its own.
    """
    present = trainer.precision_plugin
    if type(present) in both(Precision):
        return
    raise UserError(
        worded(
            f"SetPrecision({name!r}): the Trainer has a precision of its own, {type(present).__name__} "
            f"({trainer.precision}). Remove precision= and precision plugins from the Trainer; with a strategy that "
            "brings its own (FSDP, DeepSpeed, XLA), use Trainer(precision=...) without SetPrecision"
        )
    )


def shards(trainer: Trainer) -> bool:
    """Whether the module shards itself in ``configure_model`` (FSDP2), before its parameters can be converted.

    A strategy that shards a module which knows nothing of it converts the parameters first, and says so.
    """
    strategy = trainer.strategy
    converts_first = getattr(strategy, "converts_before_sharding", False)
    return isinstance(strategy, both(ModelParallelStrategy)) and not converts_first


def install(trainer: Trainer, name: str, scaler: torch.amp.GradScaler | None) -> Any:
    """Give the Trainer the precision plugin of a name, and return it.

    Args:
        trainer: in ``setup``.
        name: as Lightning has it: ``16-mixed``, ``bf16-mixed``, ``bf16-true`` or ``32-true``.
        scaler: of ``16-mixed``.
    """
    package = next(i for i, kind in enumerate(both(Trainer)) if isinstance(trainer, kind))
    made: Any
    if name == "32-true":
        made = both(Precision)[package]()
    elif name == "bf16-true":
        made = both(HalfPrecision)[package]("bf16-true")
    else:
        device = trainer.strategy.root_device.type
        made = both(MixedPrecision)[package](name, device, scaler)  # type: ignore[arg-type]
    trainer.strategy.precision_plugin = made
    return made


def extend(
    precision: Any,
    convert: Callable[[nn.Module, Callable[[nn.Module], nn.Module]], nn.Module],
    around_step: Callable[[], contextlib.AbstractContextManager[None]],
    autocast: Callable[[], torch.autocast | None],
) -> None:
    """Replace methods of this one object; the class stays Lightning's, and so does its key in checkpoints.

    Args:
        precision: from `install`.
        convert: gets the module and Lightning's conversion of it, before the optimizer is made.
        around_step: a context for ``training_step``.
        autocast: the context of the forward pass; None: Lightning's.
    """
    lightnings, step, mixed = precision.convert_module, precision.train_step_context, None

    @contextlib.contextmanager
    def train_step_context() -> Iterator[None]:
        with step(), around_step():
            yield

    precision.convert_module = lambda module: convert(module, lightnings)
    precision.train_step_context = train_step_context
    mixed = getattr(precision, "autocast_context_manager", None)
    if mixed is not None:
        precision.autocast_context_manager = lambda: autocast() or mixed()


def restore(precision: Any) -> None:
    """Undo `extend`; the object stays the Trainer's, with its scaler."""
    for method in ("convert_module", "train_step_context", "autocast_context_manager", "kept_modules"):
        precision.__dict__.pop(method, None)


def evaluate_without_inference_mode(trainer: Trainer) -> Callable[[], None]:
    """Validate, test and predict under ``no_grad``, as the validation of a fit does.

    Within ``inference_mode`` torch does not decompose operations before a tensor subclass gets them, and torchao's
    float8 tensors do not have all of them.

    Args:
        trainer: in ``setup``.

    Returns:
        A function that undoes this.
    """
    loops: tuple[Any, ...] = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    before = [loop.inference_mode for loop in loops]
    for loop in loops:
        loop.inference_mode = False

    def undo() -> None:
        for loop, mode in zip(loops, before, strict=True):
            loop.inference_mode = mode

    return undo
