"""Building a run's objects from run.yaml: model, data, optimizer, callbacks, logger and Trainer."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar

from stabletrain.config.build import build_callback, callbacks
from stabletrain.config.trust import instantiate
from stabletrain.errors import UserError
from stabletrain.launch.checkpoint_mismatch import explain_misfits
from stabletrain.launch.interrupt import SaveAndStop
from stabletrain.launch.progress import progress_bar
from stabletrain.launch.signals import SignalWatch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A run that is ready to fit.

    Args:
        trainer: Lightning's Trainer, with all callbacks.
        model: what is trained.
        data: what it is trained on.
        stopper: the callback that ends the run on a signal; its ``started`` tells whether a batch has begun.
        resume: checkpoint to go on from.
    """

    trainer: Trainer
    model: LightningModule
    data: LightningDataModule
    stopper: SaveAndStop
    resume: str | None

    def fit(self) -> None:
        """Train. Checkpoints are read as data, never as code.

        Raises:
            UserError: if the checkpoint to go on from is another model's or optimizer's.
        """
        safe = None if self.resume is None else True
        if self.resume is not None:
            explain_misfits(self.trainer.strategy, self.resume)
        self.trainer.fit(self.model, datamodule=self.data, ckpt_path=self.resume, weights_only=safe)


def assemble(config: Mapping[str, Any], watch: SignalWatch) -> Assembled:
    """Build a run.

    Args:
        config: the content of a run.yaml.
        watch: what receives the process's signals.

    Raises:
        UserError: if a node builds something else than its place needs.
        TrustError: if a node names something a config may not build.
    """
    torch.set_num_threads(config["launch"]["threads"])
    # Filling fresh tensors with NaN in deterministic mode finds bugs in operators and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    seed_everything(config["seed"], workers=True, verbose=False)
    folder = Path(config["run_dir"]) / "checkpoints"
    model = _made(config["model"], "model", LightningModule)
    data = _made(config["data"], "data", LightningDataModule)
    if config.get("optimizer"):
        override_optimizer(model, config["optimizer"])
    stopper = SaveAndStop(watch, folder)
    arguments = trainer_arguments(config)
    found = run_callbacks(config, arguments, folder)
    logger = instantiate(config["logger"], key="logger") if config.get("logger") else False
    trainer = Trainer(**arguments, callbacks=[*found, stopper], logger=logger, default_root_dir=config["run_dir"])
    return Assembled(trainer=trainer, model=model, data=data, stopper=stopper, resume=config.get("resume"))


def override_optimizer(model: LightningModule, node: Mapping[str, Any]) -> None:
    """Give one module instance another ``configure_optimizers``; the class stays as it is.

    Args:
        model: the module.
        node: a ``_partial_`` node of an optimizer class.
    """
    make = instantiate(node, key="optimizer")

    def configure_optimizers(module: LightningModule) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = make([parameter for parameter in module.parameters() if parameter.requires_grad])
        return made

    # nn.Module would refuse nothing here, but a bound method keeps Lightning's check for overridden hooks working.
    model.configure_optimizers = types.MethodType(configure_optimizers, model)  # type: ignore[method-assign]


def run_callbacks(config: Mapping[str, Any], arguments: Mapping[str, Any], folder: Path) -> list[Callback]:
    """Return schedule, plugins and further callbacks in the config's order, then checkpointing and progress.

    Args:
        config: the content of a run.yaml.
        arguments: the Trainer's arguments.
        folder: where checkpoints go.
    """
    found: list[Callback] = []
    if config.get("schedule"):
        found.append(build_callback(config["schedule"], key="schedule"))
    found += callbacks(config.get("plugins"))
    if config.get("chaos"):
        found.append(build_callback(config["chaos"], key="chaos"))
    for name, node in (config.get("callbacks") or {}).items():
        if node:
            found.append(build_callback(node, key=f"callbacks.{name}"))
    if arguments.get("enable_checkpointing") is not False:
        if not any(isinstance(callback, Checkpoint) for callback in found):
            found.append(ModelCheckpoint(filename="{step}", save_last="link"))
        for callback in found:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder)
    if arguments.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in found):
        found.append(progress_bar())
    return found


def trainer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Trainer's arguments from ``trainer``, ``precision`` and ``strategy``, nodes in them built.

    Args:
        config: the content of a run.yaml.
    """
    arguments: dict[str, Any] = {}
    for part in ("trainer", "precision", "strategy"):
        for name, value in (config.get(part) or {}).items():
            arguments[name] = _build_inside(value, f"{part}.{name}")
    return arguments


def _build_inside(value: object, key: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return instantiate(value, key=key)
        return {name: _build_inside(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_build_inside(inner, f"{key}[{index}]") for index, inner in enumerate(value)]
    return value


def _made(node: Mapping[str, Any], key: str, expected: type[T]) -> T:
    built = instantiate(node, key=key)
    if not isinstance(built, expected):
        raise UserError(f"{key}: {node['_target_']!r} made a {type(built).__name__}, expected a {expected.__name__}")
    return built
