"""What goes with a schedule-free optimizer: a constant learning rate, and no running statistics."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import lr_scheduler

from stabletrain.core.schedule import Schedule
from stabletrain.errors import UserError


def is_schedule_free(optimizer: Any) -> bool:
    """Whether an optimizer trains other weights than those that are evaluated, and switches by ``train`` and ``eval``.

    Args:
        optimizer: of any class.
    """
    switches = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
    return switches and all("train_mode" in group for group in optimizer.param_groups)


def check_support(trainer: Trainer, module: LightningModule) -> None:
    """Refuse learning rates that change after the warm-up, and modules with running statistics.

    Args:
        trainer: with its callbacks, and with schedulers if the optimizer exists.
        module: to be trained.

    Raises:
        UserError: with what to do instead.
    """
    schedules = [each for each in trainer.callbacks if isinstance(each, Schedule)]  # type: ignore[attr-defined]
    for schedule in schedules:
        if schedule.kind != "constant":
            raise UserError(
                f"a schedule-free optimizer needs a learning rate that is constant after its warm-up, got "
                f"ScheduleLR({schedule.kind!r}): its average replaces the decay. Use ScheduleLR('constant') (config "
                "key schedule=constant), or no schedule and the optimizer's warmup_steps (schedule=none)"
            )
    for config in [] if schedules else trainer.lr_scheduler_configs:
        if not _is_warm_up(config.scheduler):
            raise UserError(
                f"a schedule-free optimizer needs a learning rate that is constant after its warm-up, got "
                f"{type(config.scheduler).__name__}: its average replaces the decay. Return no scheduler from "
                "configure_optimizers, and use the optimizer's warmup_steps or ScheduleLR('constant') (config key "
                "schedule=constant)"
            )
    names = [
        name
        for name, each in module.named_modules()
        if getattr(each, "running_mean", None) is not None and each.training
    ]
    if names:
        raise UserError(
            f"a schedule-free optimizer evaluates other weights than it trains, and the running statistics of "
            f"{len(names)} modules ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}) would be those of the "
            "trained ones. Use GroupNorm or LayerNorm, put these modules into eval(), or use another optimizer (config "
            "key optimizer)"
        )


def _is_warm_up(scheduler: object) -> bool:
    """Whether a scheduler of torch only warms up: its factor ends at 1."""
    if isinstance(scheduler, lr_scheduler.LinearLR):
        return float(scheduler.end_factor) == 1.0
    return isinstance(scheduler, lr_scheduler.ConstantLR)
