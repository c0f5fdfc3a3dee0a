"""``stabletrain.doctor``: ask all checks about a module and its loaders."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from stabletrain.checkup.answer import KINDS, Answer, finding, not_applicable
from stabletrain.checkup.case import SCAN, Case
from stabletrain.checkup.reading import Batches, read
from stabletrain.checkup.report import Report, Result
from stabletrain.checkup.table import CHECKS, Check
from stabletrain.checkup.training import Lab
from stabletrain.errors import UserError, did_you_mean, is_number
from stabletrain.runtime import rng
from stabletrain.runtime.internals.packages import both
from stabletrain.terminal import quiet

if TYPE_CHECKING:
    import pytorch_lightning

SECONDS = 60.0
"""Time after which no further step is made."""
_READING = 0.25
"""Share of the time after which no further batch is read."""
_OF_LOADER = ("batch_size", "dataset")
"""Attributes of the train loader that a module may ask for."""
_SKIPPED = "it was to be left out (skip)"


def doctor(
    module: LightningModule | pytorch_lightning.LightningModule,
    train_loader: Any,
    val_loader: Any = None,
    *,
    skip: Collection[str] = (),
    seconds: float = SECONDS,
    accelerator: str = "auto",
) -> Report:
    """Look for common mistakes in a module and its data before a run, in less than a minute for a small one.

    The first batches of the loaders are read once; deep copies of the module are trained on them for a few steps each,
    with the module's own optimizer, in a Trainer of its own on one device, without callbacks, loggers and files. The
    module, the loaders' position and generators, and all random numbers are as before. The validation loader is only
    read; ``validation_step`` is not called.

    Args:
        module: a LightningModule, new or trained.
        train_loader: a DataLoader, or anything else that can be iterated anew; infinite ones too.
        val_loader: of the validation data; None: there is none.
        skip: names of checks that are left out, such as ``frozen`` in a fine-tuning.
        seconds: after which no further step is made, > 0; what could not be judged by then is not applicable. A step
            that has begun is not interrupted.
        accelerator: as in Lightning's Trainer.

    Returns:
        The report: ``print(report)``, ``report.findings``, ``report.as_json()``.

    Raises:
        UserError: if an argument is of the wrong kind or no accelerator of this machine, the module cannot be copied,
            or a loader is an iterator.
    """
    if not isinstance(module, both(LightningModule)):
        raise UserError(f"doctor: module: expected a LightningModule, got a {type(module).__name__}; pass an instance")
    if not is_number(seconds) or not seconds > 0:
        raise UserError(f"doctor: seconds must be > 0, got {seconds!r}")
    return examine(
        module, train_loader, val_loader,
        name=type(module).__name__, skip=skip, seconds=seconds, trainer={"accelerator": accelerator},
    )  # fmt: skip


def examine(
    module: LightningModule,
    train_loader: Any,
    val_loader: Any,
    *,
    name: str,
    skip: Collection[str] = (),
    seconds: float = SECONDS,
    data: LightningDataModule | None = None,
    trainer: Mapping[str, Any] | None = None,
    warmup: int = 0,
) -> Report:
    """As `doctor`, for a module whose arguments were checked.

    Args:
        module: see `doctor`.
        train_loader: see `doctor`.
        val_loader: see `doctor`.
        name: of the report.
        skip: see `doctor`.
        seconds: see `doctor`.
        data: the data module whose hooks for batches are used.
        trainer: further arguments of the Trainer.
        warmup: steps of a linear rise of the learning rate; 0: none.

    Raises:
        UserError: see `doctor`.
    """
    if isinstance(skip, str) or not isinstance(skip, Collection):
        raise UserError(f"doctor: skip: expected a list of names of checks, such as ['frozen'], got {skip!r}")
    for each in skip:
        if each not in (known := [check.name for check in CHECKS]):
            raise UserError(f"doctor: skip: there is no check {each!r}{did_you_mean(each, known)}; {', '.join(known)}")
    start = time.monotonic()
    # Lightning leaves gradients enabled after a fit; it cannot train in inference mode
    with rng.preserved(), quiet(), _eager(), torch.inference_mode(False), torch.enable_grad():
        train = read(train_loader, "train_loader", seconds=seconds * _READING)
        val = None if val_loader is None else _read_validation(val_loader, seconds)
        given = {name: getattr(train_loader, name) for name in _OF_LOADER if hasattr(train_loader, name)}
        lab = Lab(module, train.read, start + seconds, data, dict(trainer or {}), warmup, given) if train.read else None
        case = Case(lab, train, val)
        results = [Result(check, _asked(check, case, skip)) for check in CHECKS]
    results.sort(key=lambda each: KINDS.index(each.answer.kind))
    return Report(name=name, results=tuple(results), seconds=time.monotonic() - start)


def _read_validation(loader: Any, seconds: float) -> Batches:
    """The first batches of the validation loader, of the first one if there are several."""
    first = loader[0] if isinstance(loader, list | tuple) and loader else loader
    return read(first, "val_loader", most=SCAN, seconds=seconds * _READING)


def _asked(check: Check, case: Case, skip: Collection[str]) -> Answer:
    """The answer of a check; one that raises is a finding with its text."""
    if check.name in skip:
        return not_applicable(_SKIPPED)
    try:
        return check.ask(case)
    except Exception as error:
        trace = "".join(traceback.format_exception(error)).rstrip()
        return finding(f"the check itself has raised {type(error).__name__}: {error}", trace)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Nothing is compiled: a few steps are not worth it, and calls inside compiled functions are not seen."""
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
