"""Build the objects of a run from run.yaml: model, data, optimizer, callbacks, logger and Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar

from stabletrain.config.build import build_callback
from stabletrain.config.construct import instantiate, instantiate_arguments
from stabletrain.config.kinds import TRAINER_PARTS, is_callback, is_node
from stabletrain.config.outputs import Outputs
from stabletrain.config.trust import resolve
from stabletrain.core.intervals import seconds
from stabletrain.errors import UserError
from stabletrain.launch.checkpoint_mismatch import explain_mismatch
from stabletrain.launch.interrupt import SaveAndStop
from stabletrain.launch.progress import progress_bar
from stabletrain.launch.record_resume import RecordResume
from stabletrain.launch.throughput import MeasureThroughput
from stabletrain.optim.build import build_optimizer, replace_configure_optimizers
from stabletrain.optim.options import KEY, group_options
from stabletrain.runtime.checkpoints.collecting import divides_with_dtensors
from stabletrain.runtime.checkpoints.lightning_io import check_when_reading
from stabletrain.runtime.checkpoints.sigterm_every import check_sigterm_every
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.options import Guard, changed_options
from stabletrain.runtime.guard.record_steps import RecordSteps
from stabletrain.runtime.internals.process_groups import wait_at_most
from stabletrain.runtime.internals.trainer import reads_own_checkpoints
from stabletrain.runtime.records.record_losses import RecordLosses
from stabletrain.runtime.records.run_files import CHECKPOINTS, STEPS
from stabletrain.runtime.signal_watch import SignalWatch
from stabletrain.settings import by_config

T = TypeVar("T")

AVERAGING = "averaging"
"""The slot of a callback that switches between the weights that are trained and their average."""


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
            if divides_with_dtensors(self.trainer) or not reads_own_checkpoints(self.trainer):
                check_when_reading(self.trainer)
            explain_mismatch(self.trainer.strategy, self.resume)
        self.trainer.fit(self.model, datamodule=self.data, ckpt_path=self.resume, weights_only=weights_only)


class Attempt(Protocol):
    """Called for each part of a run; it may catch exceptions, to collect them, and then returns None."""

    def __call__(self, key: str, make: Callable[[], T]) -> T | None:
        """Build one part.

        Args:
            key: its config key.
            make: builds it.
        """


def build_or_raise(key: str, make: Callable[[], T]) -> T | None:
    """The `Attempt` of a run that ends at the first exception."""
    return make()


@dataclass(kw_only=True)
class Parts:
    """The objects of a run while it is built; None: not built, or failed.

    Args:
        model: the module to train.
        data: its data module.
        arguments: of the Trainer, by their config keys.
        callbacks: by their config keys, in the Trainer's order.
        logger: of the Trainer.
        interrupt: the callback that ends the run on a signal.
        trainer: with all of them.
    """

    model: LightningModule | None = None
    data: LightningDataModule | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: list[tuple[str, Callback]] = field(default_factory=list)
    logger: Any = False
    interrupt: SaveAndStop
    trainer: Trainer | None = None


def assembled(parts: Parts, config: Mapping[str, Any]) -> Assembled:
    """Return the run that complete parts make.

    Args:
        parts: with model, data module and Trainer.
        config: the content of a run.yaml.
    """
    assert parts.trainer is not None
    assert parts.model is not None
    assert parts.data is not None
    return Assembled(
        trainer=parts.trainer,
        model=parts.model,
        data=parts.data,
        interrupt=parts.interrupt,
        resume=config.get("resume"),
    )


def build_parts(
    config: Mapping[str, Any],
    watch: SignalWatch,
    attempt: Attempt = build_or_raise,
    *,
    model: Callable[[], LightningModule] | None = None,
) -> Parts:
    """Build the objects of a run in the order in which they draw random numbers: first the model, then the data module.

    Args:
        config: the content of a run.yaml, checked (`stabletrain.config.validate.check_signatures`), so that nothing is
            built if there is something in it that may not be.
        watch: the handler of the process's signals.
        attempt: builds each part.
        model: builds the model; None: from the config.
    """
    torch.set_num_threads(config["launch"]["threads"])
    # in deterministic mode torch fills new tensors with NaN, which costs time and changes no result
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    seed_everything(config["seed"], workers=True, verbose=False)
    folder = Path(config["run_dir"]) / CHECKPOINTS
    parts = Parts(interrupt=SaveAndStop(watch, folder))
    parts.model = module = attempt("model", model or (lambda: build_model(config)))
    parts.data = attempt("data", lambda: build_data(config))
    if config.get("optimizer") and module is not None:
        groups = config.get("param_groups") or {}
        attempt("optimizer", lambda: override_optimizer(module, config["optimizer"], groups))
    parts.arguments = trainer_arguments(config, attempt)
    arguments = {key.partition(".")[2]: value for key, value in parts.arguments.items()}
    parts.callbacks = run_callbacks(config, arguments, folder, attempt)
    parts.logger = attempt("logger", lambda: build_logger(config))
    found = [callback for _, callback in parts.callbacks]
    parts.trainer = attempt(
        "trainer",
        lambda: Trainer(
            **arguments,
            callbacks=[*found, *recorders(found, config), parts.interrupt],
            logger=parts.logger,
            default_root_dir=config["run_dir"],
        ),
    )
    if parts.trainer is not None:
        check_sigterm_every(parts.trainer, (config.get("runtime") or {}).get("sigterm_every", 1))
    timeout = config["launch"].get("timeout")  # missing in a run.yaml of an earlier version
    if parts.trainer is not None and parts.trainer.world_size > 1 and timeout is not None:
        wait_at_most(parts.trainer, seconds(timeout, name="launch.timeout"))
    for key, callback in parts.callbacks:
        prepare = getattr(callback, "prepare_trainer", None)  # of SetPrecision, say
        if prepare is not None and parts.trainer is not None and module is not None:
            attempt(key, partial(prepare, parts.trainer, module))
    return parts


def recorders(callbacks: Sequence[Callback], config: Mapping[str, Any]) -> list[Callback]:
    """Return the callbacks that record a run: its speed, every step, and the step at which it is resumed.

    Of a step these are the loss and the norm that plugins measure; without any plugin, only the loss.

    Args:
        callbacks: of the run.
        config: the content of a run.yaml.
    """
    path = Path(config["run_dir"]) / STEPS
    is_guarded = any(isinstance(callback, GuardMember) for callback in callbacks)
    steps = RecordSteps(path) if is_guarded else RecordLosses(path)
    # the earlier run's record is there before that of this one goes on
    return [MeasureThroughput(), *([RecordResume(config)] if config.get("resume") else []), steps]


def build_model(config: Mapping[str, Any]) -> LightningModule:
    """Build the module to train.

    Args:
        config: the content of a run.yaml.
    """
    model: LightningModule = instantiate(config["model"], key="model")
    return model


def build_data(config: Mapping[str, Any]) -> LightningDataModule:
    """Build the data module.

    Args:
        config: the content of a run.yaml.
    """
    data: LightningDataModule = instantiate(config["data"], key="data")
    return data


def build_logger(config: Mapping[str, Any]) -> Any:
    """Build the Trainer's logger; False if there is none.

    Args:
        config: the content of a run.yaml.
    """
    node = config.get("logger")
    return instantiate(node, key="logger", outputs=outputs_of(config)) if node else False


def override_optimizer(
    model: LightningModule, node: Mapping[str, Any], groups: Mapping[str, Any] | None = None
) -> None:
    """Replace ``configure_optimizers`` of one module instance; its class is unchanged.

    Args:
        model: the module.
        node: a ``_partial_`` node of an optimizer class.
        groups: options of the parameter groups, see `stabletrain.optim.options.GroupOptions`; None: the defaults.
    """
    make, options = instantiate(node, key="optimizer"), group_options(KEY, **(groups or {}))
    replace_configure_optimizers(model, lambda module: build_optimizer(module, make, options), options)


def run_callbacks(
    config: Mapping[str, Any], arguments: Mapping[str, Any], folder: Path, attempt: Attempt = build_or_raise
) -> list[tuple[str, Callback]]:
    """Return precision, schedule, plugins and further callbacks in the config's order, then checkpointing and progress.

    Args:
        config: the content of a run.yaml.
        arguments: the Trainer's arguments.
        folder: the folder of checkpoints.
        attempt: builds each of them.

    Returns:
        Pairs of a config key and a callback.
    """
    precision = config.get("precision")
    nodes: dict[str, Any] = {"precision": precision} if is_callback("precision", precision) else {}
    nodes["schedule"] = config.get("schedule")
    nodes |= {f"plugins.{slot}": node for slot, node in (config.get("plugins") or {}).items()}
    nodes |= switching(config)
    changed = changed_options(config.get("guard") or {})
    nodes |= {"guard": changed, "chaos": config.get("chaos")}
    nodes |= {f"callbacks.{name}": node for name, node in (config.get("callbacks") or {}).items()}
    outputs = outputs_of(config)
    found: list[tuple[str, Callback]] = []
    for key, node in nodes.items():
        if not node:
            continue
        built: Callback | None = attempt(key, partial(_build_callback, key, node, outputs))
        if built is not None:
            found.append((key, built))
    built_ones = [callback for _, callback in found]
    if arguments.get("enable_checkpointing") is not False:
        if not any(isinstance(callback, Checkpoint) for callback in built_ones):
            built_ones.append(ModelCheckpoint(filename="{step}", save_last="link"))
            found.append(("trainer.enable_checkpointing", built_ones[-1]))
        for callback in built_ones:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder)
    if arguments.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in built_ones):
        found.append(("trainer.enable_progress_bar", progress_bar()))
    return found


def switching(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the callback, as a node by its key, that an optimizer with ``train`` and ``eval`` needs; else nothing.

    Args:
        config: the content of a run.yaml.
    """
    node = config.get("optimizer")
    if not node or (config.get("plugins") or {}).get(AVERAGING):
        return {}
    try:
        kind = resolve(node["_target_"], [torch.optim.Optimizer])
    except UserError:  # reported where the optimizer is built
        return {}
    needed = all(callable(getattr(kind, name, None)) for name in ("train", "eval"))
    return {f"plugins.{AVERAGING}": {"_target_": "stabletrain.SwitchScheduleFree"}} if needed else {}


def _build_callback(key: str, node: Mapping[str, Any], outputs: Outputs) -> Callback:
    if key == "guard":
        with by_config():
            return Guard(**{name: outputs.place(f"guard.{name}", value) for name, value in node.items()})
    return build_callback(node, key=key, outputs=outputs)


def trainer_arguments(config: Mapping[str, Any], attempt: Attempt = build_or_raise) -> dict[str, Any]:
    """Return the Trainer's arguments from ``trainer``, ``precision`` and ``strategy``, with nodes built.

    Args:
        config: the content of a run.yaml.
        attempt: builds each of them.

    Returns:
        Values by config keys such as ``trainer.max_steps``.
    """
    arguments: dict[str, Any] = {}
    outputs = outputs_of(config)
    for part in TRAINER_PARTS:
        if part == "strategy" and is_node(part, config.get(part)):
            built = attempt(part, partial(instantiate, config[part], key=part, outputs=outputs))
            if built is not None:
                arguments["strategy.strategy"] = built
        for name, value in ({} if is_node(part, config.get(part)) else config.get(part) or {}).items():
            built = attempt(f"{part}.{name}", partial(_build_argument, part, name, value, outputs))
            if built is not None or value is None:  # else it has failed
                arguments[f"{part}.{name}"] = built
    return arguments


def _build_argument(part: str, name: str, value: Any, outputs: Outputs) -> Any:
    return instantiate_arguments(Trainer, {name: value}, key=part, outputs=outputs)[name]


def outputs_of(config: Mapping[str, Any]) -> Outputs:
    """Return where the relative paths in a run.yaml are.

    Args:
        config: the content of a run.yaml.
    """
    return Outputs(Path(config.get("run_dir") or ""), frozenset(config.get("typed") or ()))
