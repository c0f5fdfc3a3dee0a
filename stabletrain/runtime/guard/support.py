"""What the guard cannot guard, refused before the first step, with the reason and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer

from stabletrain.errors import UserError
from stabletrain.runtime.internals import trainer as trainer_internals

if TYPE_CHECKING:
    from stabletrain.runtime.guard.callbacks import GuardMember
    from stabletrain.runtime.guard.step_guard import Mode


def check_setup(trainer: Trainer, module: LightningModule, members: Sequence[GuardMember]) -> None:
    """Refuse what is known before the optimizer exists.

    Raises:
        UserError: for manual optimization, a strategy that steps by itself, or a second clipper.
    """
    if not module.automatic_optimization:
        raise UserError(
            f"{_listed(members)}: {type(module).__name__} uses manual optimization, where Lightning calls no hook "
            "between backward and step. Use automatic optimization, or remove these plugins."
        )
    if trainer_internals.handles_own_steps(trainer):
        raise UserError(
            f"{_listed(members)}: {type(trainer.strategy).__name__} accumulates, clips and steps in its own engine. "
            "Use strategy=ddp or a ModelParallelStrategy (FSDP2), or remove these plugins."
        )
    clippers = [m for m in members if getattr(m, "clips", False)]
    if trainer.gradient_clip_val and clippers:
        raise UserError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) and {_listed(clippers)} would both clip. Remove "
            "gradient_clip_val (config key trainer.gradient_clip_val); ClipNorm(max_norm) does the same and is counted."
        )


def check_optimizer(trainer: Trainer) -> None:
    """Refuse optimizers that the guard cannot guard.

    Raises:
        UserError: for none or several optimizers, and for LBFGS.
    """
    if len(trainer.optimizers) != 1:
        raise UserError(
            f"stabletrain plugins guard exactly one optimizer, and configure_optimizers returned "
            f"{len(trainer.optimizers)}. Merge them into one optimizer with parameter groups, or remove the plugins."
        )
    if not any(group["params"] for group in trainer.optimizers[0].param_groups):
        raise UserError(
            "stabletrain plugins guard an optimizer, and configure_optimizers returned none. Return one, or remove the "
            "plugins."
        )
    if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        raise UserError(
            "stabletrain plugins cannot guard LBFGS: it evaluates the loss several times within one step, so there is "
            "no single gradient to judge. Use a first-order optimizer, or remove the plugins."
        )


def decides_on_device(trainer: Trainer, mode: Mode, device: torch.device) -> bool:
    """Whether decisions ride on the optimizer's kernel (device mode), or the host reads first (exact mode).

    Raises:
        UserError: if ``mode`` is ``"device"`` and that is impossible.
    """
    obstacle = _obstacle_to_device_mode(trainer)
    if mode == "device" and obstacle:
        raise UserError(f'Guard(mode="device"): {obstacle}. Use mode="auto" (config key guard.mode).')
    if mode == "auto":
        return device.type == "cuda" and obstacle is None
    return mode == "device"


def _obstacle_to_device_mode(trainer: Trainer) -> str | None:
    optimizer = trainer.optimizers[0]
    if not trainer_internals.supports_device_decisions(optimizer):
        return f"{type(optimizer).__name__} has no kernel that can drop a step; torch's fused=True optimizers have"
    if trainer_internals.grad_scaler(trainer) is not None:
        return "the GradScaler uses the same kernel arguments"
    if any(config.interval == "step" for config in trainer.lr_scheduler_configs):
        return "the module's own per-step scheduler could not be held in time; ScheduleLR can"
    return None


def _listed(members: Sequence[GuardMember]) -> str:
    return ", ".join(type(member).__name__ for member in members)
