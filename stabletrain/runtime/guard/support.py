"""Errors for setups that the guard does not support, raised before the first step, with what to do instead."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal, TypeAlias, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime.guard.hooks import check_hooks
from stabletrain.runtime.guard.loss_scaling import LossScaling
from stabletrain.runtime.guard.sharded_optimizers import check_sharded
from stabletrain.runtime.guard.strategy_checks import check_strategy
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.ddp import overlaps_with_ddp
from stabletrain.runtime.records.event_log import logger

DecisionMode: TypeAlias = Literal["auto", "exact", "device"]
_Member = TypeVar("_Member")


def check_setup(trainer: Trainer, module: LightningModule, members: Sequence[Callback]) -> None:
    """Raise errors for unsupported setups that are known before the optimizer exists.

    Args:
        trainer: in ``setup`` of a fit.
        module: the module that is trained.
        members: the callbacks that share the guard.

    Raises:
        UserError: for a strategy that the guard does not support, a second clipper, or a wrong hook.
    """
    check_strategy(trainer, module, _listed(members))
    clippers = [m for m in members if _clips(m) and not _is_default(m)]
    if trainer.gradient_clip_val and clippers:
        raise UserError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) and {_listed(clippers)} would both clip. Remove "
            "gradient_clip_val (config key trainer.gradient_clip_val); ClipNorm(max_norm) does the same and is counted."
        )
    check_hooks([*trainer.callbacks, module, trainer.datamodule])  # type: ignore[attr-defined]


def refuse_manual(plugin: str, module: LightningModule) -> None:
    """Raise an error for a module with manual optimization, whose accumulation windows only the module knows.

    Args:
        plugin: the class that refuses it.
        module: the module that is trained.
    """
    if not module.automatic_optimization:
        raise UserError(
            f"{plugin}: {type(module).__name__} steps by hand (automatic_optimization=False), and decides itself over "
            "how many backward passes a gradient is accumulated, and how they are weighted. Remove the plugin (config "
            "key plugins/accumulate=none), or let Lightning step"
        )


def active_members(trainer: Trainer, members: Sequence[_Member]) -> list[_Member]:
    """The members without those that step back from the Trainer's own clipping; the first time that is logged.

    Args:
        trainer: in ``setup`` of a fit.
        members: the callbacks that share the guard.
    """
    if not trainer.gradient_clip_val:
        return list(members)
    idle = [m for m in members if _clips(m) and _is_default(m)]
    if idle and trainer.is_global_zero:
        logger.warning(
            "Trainer(gradient_clip_val=%s) clips in this run: %s, a default, is off. To have it, remove "
            "gradient_clip_val",
            trainer.gradient_clip_val,
            _listed(idle),
        )
    return [m for m in members if not any(m is each for each in idle)]


def check_optimizer(trainer: Trainer) -> None:
    """Raise an error for unsupported optimizers. Several optimizers exist only with manual optimization.

    Raises:
        UserError: for no optimizer; for LBFGS and others that need a closure; for a ZeroRedundancyOptimizer that steps
            in backward; for torchao's CPUOffloadOptimizer; for sharded parameters with an optimizer that fails on them.
    """
    if not any(group["params"] for each in trainer.optimizers for group in each.param_groups):
        raise UserError(
            "stabletrain plugins need an optimizer, but configure_optimizers returned none. Return one, or remove the "
            "plugins."
        )
    if any(isinstance(each, torch.optim.LBFGS) for each in trainer.optimizers):
        raise UserError(
            "stabletrain plugins do not support LBFGS: it evaluates the loss several times within one step, so there "
            "is no single gradient to measure. Use a first-order optimizer, or remove the plugins."
        )
    for each in trainer.optimizers:
        if overlaps_with_ddp(each):
            raise UserError(
                f"{type(each).__name__}(overlap_with_ddp=True) steps within backward, in a communication hook that "
                "Lightning does not register: nothing would be trained. Use overlap_with_ddp=False (or strategy="
                "ddp_zero1)."
            )
        if _needs_closure(each):
            raise UserError(
                f"stabletrain plugins do not support {type(each).__name__}: its step() cannot be called without a "
                "closure, in which it computes the loss, several times perhaps, so there is no single gradient to "
                "measure. Use a first-order optimizer, or remove the plugins."
            )
        if any(kind.__name__ == "CPUOffloadOptimizer" for kind in type(each).__mro__):
            raise UserError(
                "stabletrain plugins do not support CPUOffloadOptimizer: it copies the gradients to the CPU during "
                "backward, before a plugin can clip them, and its copies of the weights there would overwrite those "
                "that a rollback restores. Use an optimizer with 8-bit state (torchao's AdamW8bit, bitsandbytes), or "
                "remove the plugins."
            )
    check_sharded(trainer.optimizers)


def decides_on_device(trainer: Trainer, module: LightningModule, mode: DecisionMode, device: torch.device) -> bool:
    """Whether the optimizer's kernel executes decisions (device mode), or the host reads first (exact mode).

    Args:
        trainer: in a fit, with its optimizer.
        module: that is trained.
        mode: what the user chose.
        device: where the parameters are.

    Raises:
        UserError: if ``mode`` is ``"device"`` and that is impossible.
    """
    obstacle = _obstacle_to_device_mode(trainer, module)
    if mode == "device" and obstacle:
        raise UserError(f'Guard(mode="device"): {obstacle}. Use mode="auto" (config key guard.mode).')
    if mode == "auto":
        return device.type == "cuda" and obstacle is None
    return mode == "device"


def _obstacle_to_device_mode(trainer: Trainer, module: LightningModule) -> str | None:
    optimizer: Optimizer = trainer.optimizers[0]
    if not module.automatic_optimization:
        return "the module steps by hand, and may step schedules too, before the outcome of a step would be known"
    if not trainer_internals.supports_device_decisions(optimizer):
        return f"{type(optimizer).__name__} has no kernel that can drop a step; torch's fused=True optimizers have"
    if not type(optimizer).step.__module__.startswith("torch.optim."):
        return (
            f"{type(optimizer).__name__} has a step() of its own: what it changes besides torch's could not be undone"
        )
    if LossScaling(trainer).is_active:
        return "the GradScaler uses the same kernel arguments"
    if any(config.interval == "step" for config in trainer.lr_scheduler_configs):
        return "the module's own per-step scheduler advances before the outcome is known; use ScheduleLR instead"
    return None


def _needs_closure(optimizer: Optimizer) -> bool:
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _clips(member: object) -> bool:
    return bool(getattr(member, "clips", False))


def _is_default(member: object) -> bool:
    return bool(getattr(member, "chosen_by_default", False))


def _listed(members: Sequence[object]) -> str:
    return ", ".join(type(member).__name__ for member in members)
