"""Values of Trainer and optimizer arguments that are accepted where they are given, and make a run fail later."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from stabletrain.config.problems import Problem

_AT_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "gradient_clip_val": 0,
    "min_epochs": 0,
    "min_steps": 0,
}


def check_run_values(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the mistakes; a value of the wrong type is left to the check of the signature.

    Args:
        config: a composed config.
    """
    trainer, optimizer = config.get("trainer"), config.get("optimizer")
    if isinstance(trainer, Mapping):
        yield from _trainer(trainer)
    if isinstance(optimizer, Mapping):
        for argument, value in optimizer.items():
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                yield Problem(f"optimizer.{argument}", f"expected finite numbers, got {value}")


def _trainer(given: Mapping[str, Any]) -> Iterator[Problem]:
    for argument, least in _AT_LEAST.items():
        value = given.get(argument)
        if _is_number(value) and not least <= value < float("inf"):  # NaN is no number of anything
            yield Problem(f"trainer.{argument}", f"expected a number of at least {least}, got {value}")
    interval = given.get("val_check_interval")
    if _is_number(interval) and not interval > 0:
        yield Problem(
            "trainer.val_check_interval",
            f"expected a number of batches >= 1, or a share of an epoch above 0 and up to 1.0, got {interval}; "
            "trainer.limit_val_batches=0 disables validation",
        )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
