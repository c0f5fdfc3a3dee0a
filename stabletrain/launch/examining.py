"""``stabletrain doctor``: in the process that has checked a recipe's config, its module and data are examined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from stabletrain.checkup.doctor import examine
from stabletrain.config.problems import Problem
from stabletrain.core.lengths import Length
from stabletrain.errors import UserError
from stabletrain.launch.assemble import build_data, build_model, override_optimizer
from stabletrain.launch.checks import problem_of
from stabletrain.launch.dry_run import ACCELERATORS
from stabletrain.terminal import quiet

_OF_TRAINER = ("gradient_clip_val", "gradient_clip_algorithm")
"""Arguments of the recipe's Trainer that the steps are made with."""

WARMUP = 20
"""Steps in which the learning rate rises if the recipe's schedule has a warm-up, of whatever length."""


def examine_config(
    config: Mapping[str, Any], *, skip: Sequence[str], seconds: float, width: int
) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Look for common mistakes in the module and the data of a run that `check_config` has accepted.

    Args:
        config: composed.
        skip: see `stabletrain.checkup.doctor.doctor`.
        seconds: see `stabletrain.checkup.doctor.doctor`.
        width: of a line of the report, in characters.

    Returns:
        The report, its ``lines`` and its ``content``, or None; the mistakes that only now were found.
    """
    torch.set_num_threads(config["launch"]["threads"])
    with quiet():
        seed_everything(config["seed"], workers=True, verbose=False)
        module = build_model(config)
        if config.get("optimizer"):
            override_optimizer(module, config["optimizer"], config.get("param_groups") or {})
        try:
            data = build_data(config)
            data.prepare_data()
            data.setup("fit")
            train, val = _together(data.train_dataloader()), _validation(data)
        except Exception as error:
            return None, [problem_of(error, "data", config.get("data"))]
    given = config["trainer"]
    trainer = {key: given[key] for key in _OF_TRAINER if given.get(key) is not None}
    wanted = given.get("accelerator", "auto")
    # a recipe for GPUs is examined on the CPU where there is none
    trainer["accelerator"] = "auto" if wanted in ACCELERATORS else wanted
    try:
        report = examine(
            module,
            train,
            val,
            name=config["recipe"],
            skip=skip,
            seconds=seconds,
            data=data,
            trainer=trainer,
            warmup=WARMUP if _warms_up(config.get("schedule")) else 0,
        )
    except UserError as error:
        return None, [Problem("doctor", str(error).removeprefix("doctor: "))]
    return {"lines": list(report.lines(width)), "content": report.as_json()}, []


def _warms_up(schedule: Any) -> bool:
    """Whether the node of a schedule names a warm-up."""
    given = schedule.get("lr_warmup") if isinstance(schedule, Mapping) else None
    return given is not None and Length.parse(given, name="schedule.lr_warmup").value > 0


class _Together:
    """Several train loaders, each batch of which is one of all of them, as Lightning reads them."""

    def __init__(self, loaders: Any) -> None:
        self._loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        for batch, _, _ in CombinedLoader(self._loaders, "max_size_cycle"):
            yield batch


def _together(loaders: Any) -> Any:
    return _Together(loaders) if isinstance(loaders, list | tuple | dict) else loaders


def _validation(data: LightningDataModule) -> Any:
    """The first validation loader; None if the data module has none."""
    if type(data).val_dataloader is LightningDataModule.val_dataloader:
        return None
    found = data.val_dataloader()
    if isinstance(found, list | tuple):
        return found[0] if found else None
    return found
