"""Build the objects of a run from run.yaml: model, data, optimizer, callbacks, logger and Trainer."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar

from stabletrain.config.build import build_callback, check_run
from stabletrain.config.construct import instantiate, instantiate_arguments
from stabletrain.config.kinds import TRAINER_PARTS
from stabletrain.config.outputs import Outputs
from stabletrain.launch.checkpoint_mismatch import explain_mismatch
from stabletrain.launch.interrupt import SaveAndStop
from stabletrain.launch.progress import progress_bar
from stabletrain.runtime.checkpoints.lightning_io import check_when_reading
from stabletrain.runtime.guard.options import Guard, changed_options
from stabletrain.runtime.internals.trainer import reads_own_checkpoints
from stabletrain.runtime.records.run_files import CHECKPOINTS
from stabletrain.runtime.signal_watch import SignalWatch


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """The objects of a run, ready to fit.

    Args:
        trainer: Lightning's Trainer, with all callbacks.
        model: the module to train.
        data: its data module.
        interrupt: the callback that ends the run on a signal; its ``started`` is True once a batch has begun.
        resume: path of the checkpoint to resume from; None: start from scratch.
    """

    trainer: Trainer
    model: LightningModule
    data: LightningDataModule
    interrupt: SaveAndStop
    resume: str | None

    def fit(self) -> None:
        """Train. The checkpoint is loaded with ``weights_only=True``, so that it cannot run code.

        Raises:
            UserError: if the checkpoint is damaged, holds more than data, or belongs to another model or optimizer.
        """
        weights_only = None if self.resume is None else True
        if self.resume is not None:
            if not reads_own_checkpoints(self.trainer):
                check_when_reading(self.trainer)
            explain_mismatch(self.trainer.strategy, self.resume)
        self.trainer.fit(self.model, datamodule=self.data, ckpt_path=self.resume, weights_only=weights_only)


def assemble(config: Mapping[str, Any], watch: SignalWatch) -> Assembled:
    """Build a run.

    Args:
        config: the content of a run.yaml.
        watch: the handler of the process's signals.

    Raises:
        UserError: if a node builds an object of another type than its key needs.
        TrustError: if a node names something that a config may not build.
    """
    check_run(config)
    torch.set_num_threads(config["launch"]["threads"])
    # in deterministic mode torch fills new tensors with NaN, which costs time and changes no result
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    seed_everything(config["seed"], workers=True, verbose=False)
    folder = Path(config["run_dir"]) / CHECKPOINTS
    model: LightningModule = instantiate(config["model"], key="model")
    data: LightningDataModule = instantiate(config["data"], key="data")
    if config.get("optimizer"):
        override_optimizer(model, config["optimizer"])
    interrupt = SaveAndStop(watch, folder)
    arguments = trainer_arguments(config)
    found = run_callbacks(config, arguments, folder)
    logger = False
    if config.get("logger"):
        logger = instantiate(config["logger"], key="logger", outputs=outputs_of(config))
    trainer = Trainer(**arguments, callbacks=[*found, interrupt], logger=logger, default_root_dir=config["run_dir"])
    return Assembled(trainer=trainer, model=model, data=data, interrupt=interrupt, resume=config.get("resume"))


def override_optimizer(model: LightningModule, node: Mapping[str, Any]) -> None:
    """Replace ``configure_optimizers`` of one module instance; its class is unchanged.

    Args:
        model: the module.
        node: a ``_partial_`` node of an optimizer class.
    """
    make = instantiate(node, key="optimizer")

    def configure_optimizers(module: LightningModule) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = make([p for p in module.parameters() if p.requires_grad])
        return optimizer

    # a bound method, because Lightning checks for overridden hooks by the method's function
    model.configure_optimizers = types.MethodType(configure_optimizers, model)  # type: ignore[method-assign]


def run_callbacks(config: Mapping[str, Any], arguments: Mapping[str, Any], folder: Path) -> list[Callback]:
    """Return schedule, plugins and further callbacks in the config's order, then checkpointing and progress.

    Args:
        config: the content of a run.yaml.
        arguments: the Trainer's arguments.
        folder: the folder of checkpoints.
    """
    found: list[Callback] = []
    nodes = {"schedule": config.get("schedule")}
    nodes |= {f"plugins.{slot}": node for slot, node in (config.get("plugins") or {}).items()}
    outputs = outputs_of(config)
    found += [build_callback(node, key=key, outputs=outputs) for key, node in nodes.items() if node]
    if changed := changed_options(config.get("guard") or {}):
        found.append(Guard(**{name: outputs.place(f"guard.{name}", value) for name, value in changed.items()}))
    nodes = {"chaos": config.get("chaos")}
    nodes |= {f"callbacks.{name}": node for name, node in (config.get("callbacks") or {}).items()}
    found += [build_callback(node, key=key, outputs=outputs) for key, node in nodes.items() if node]
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
    """Return the Trainer's arguments from ``trainer``, ``precision`` and ``strategy``, with the nodes in them built.

    Args:
        config: the content of a run.yaml.
    """
    arguments: dict[str, Any] = {}
    for part in TRAINER_PARTS:
        arguments |= instantiate_arguments(Trainer, config.get(part) or {}, key=part, outputs=outputs_of(config))
    return arguments


def outputs_of(config: Mapping[str, Any]) -> Outputs:
    """Return where the relative paths in a run.yaml are.

    Args:
        config: the content of a run.yaml.
    """
    return Outputs(Path(config.get("run_dir") or ""), frozenset(config.get("typed") or ()))
