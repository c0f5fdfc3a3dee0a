"""The fit of which two steps are traced: Lightning's own loop and the run's strategy, in a fake world."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler

from stabletrain.runtime import rng
from stabletrain.runtime.data.position import size_of
from stabletrain.runtime.internals.fake_world import (
    Replacement,
    drop_memory,
    leave_out_kernels,
    needs_values,
    with_values,
    without_memory,
)
from stabletrain.runtime.internals.packages import both
from stabletrain.strategies.tensor_parallel import TensorParallelStrategy
from stabletrain.strategies.tensor_parallel_random import Region

_LEFT_OUT = (
    "accelerator", "barebones", "callbacks", "check_val_every_n_epoch", "detect_anomaly", "enable_checkpointing",
    "enable_model_summary", "enable_progress_bar", "fast_dev_run", "limit_val_batches", "log_every_n_steps", "logger",
    "max_time", "num_sanity_val_steps", "overfit_batches", "plugins", "profiler", "reload_dataloaders_every_n_epochs",
    "sync_batchnorm", "val_check_interval",
)  # fmt: skip
"""Arguments of the Trainer that change nothing about two steps of training, or need the machine."""


class NoBatch(Exception):
    """The data module gives no batch; the message says why."""


def values_of_generators() -> Iterator[Replacement]:
    """What reads and sets the states of random generators, whose values are needed in a fake world, too."""
    for owner, names in ((rng, ("capture", "restore")), (Region, ("enter", "leave"))):
        for name in names:
            yield owner, name, with_values(getattr(owner, name))


class FirstOfMany(LightningEnvironment):
    """Tells Lightning that this process is the first of so many.

    Args:
        processes: of all nodes.
    """

    def __init__(self, processes: int) -> None:
        super().__init__()
        self._processes = processes

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning is to start no processes."""
        return True

    def world_size(self) -> int:
        """All processes."""
        return self._processes

    def set_world_size(self, size: int) -> None:
        """It is known."""

    def global_rank(self) -> int:
        """That of the first process."""
        return 0

    def set_global_rank(self, rank: int) -> None:
        """It is known."""

    def local_rank(self) -> int:
        """That of the first process."""
        return 0

    def node_rank(self) -> int:
        """That of the first process."""
        return 0


class Participants(Callback):
    """Lets the plugins that change what a step holds do so, and no others: these read values of tensors.

    Such a plugin has ``plan_setup`` or ``plan_fit_start``, called with Trainer and module where Lightning would call
    ``setup`` and ``on_fit_start``.

    Args:
        plugins: of the run.
    """

    def __init__(self, plugins: Sequence[Callback]) -> None:
        self.plugins = plugins

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the module is sharded."""
        self._call("plan_setup", trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After it is sharded and has its optimizer."""
        self._call("plan_fit_start", trainer, pl_module)

    def _call(self, name: str, trainer: Trainer, module: LightningModule) -> None:
        for each in self.plugins:
            if (method := getattr(each, name, None)) is not None:
                method(trainer, module)


def trainer_of_plan(
    arguments: Mapping[str, Any], plugins: Sequence[Callback], trace: Callback, *, on_ranks: bool = False
) -> Trainer:
    """The Trainer of the traced fit, on the CPU, whatever the run's accelerator is.

    Args:
        arguments: of the run's Trainer, with ``devices`` and ``num_nodes``.
        plugins: the run's callbacks.
        trace: follows the steps, or counts them.
        on_ranks: trace real ranks, whose environment says who they are, to check what is planned.
    """
    chosen = {key: value for key, value in arguments.items() if key not in _LEFT_OUT}
    strategy = chosen.get("strategy")
    if isinstance(strategy, TensorParallelStrategy):
        strategy.check = False  # it compares values
    if (options := getattr(strategy, "options", None)) is not None and options.compile_units:
        strategy.options = options._replace(compile_units=False)  # type: ignore[union-attr]
    averages = [each for each in plugins if isinstance(each, both(WeightAveraging))]
    return Trainer(
        **chosen,
        accelerator="cpu",
        callbacks=[Participants(plugins), *averages, trace],
        plugins=[] if on_ranks else [FirstOfMany(chosen["devices"] * chosen["num_nodes"])],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def fit(trainer: Trainer, module: LightningModule, data: LightningDataModule, mode: Any) -> None:
    """Fit until the trace ends it; the data module is set up, and gives its first batch again and again.

    Nothing is prepared, so nothing is downloaded.

    Args:
        trainer: from `trainer_of_plan`.
        module: without memory.
        data: with values.
        mode: from `fake_world`.

    Raises:
        NoBatch: if the data module fails, as where its files are missing; after the strategy has set up the module.
        Traced: after the traced steps.
    """
    loader = with_values(_first_batch)(trainer, data, mode)
    fixed: dict[str, Callable[..., Any]] = {
        "prepare_data": lambda: None,
        "setup": lambda stage=None: None,
        "train_dataloader": lambda: loader,
        "teardown": lambda stage=None: None,
    }
    vars(data).update(fixed)
    vars(module)["setup"] = _setup(module, module.setup, mode)
    configure = module.configure_optimizers
    vars(module)["configure_optimizers"] = lambda: _optimizers(configure)
    logging_ones = [each for each in module.modules() if isinstance(each, both(LightningModule))]
    for each in logging_ones:  # Lightning takes values of what is logged, and it is no part of a step's work
        vars(each).update(log=_no_log, log_dict=_no_log)
    try:
        trainer.fit(module, datamodule=data)
    finally:
        for name in ("setup", "configure_optimizers"):
            vars(module).pop(name, None)
        for each in logging_ones:
            for name in ("log", "log_dict"):
                vars(each).pop(name, None)
        for name in fixed:
            vars(data).pop(name, None)


def _no_log(*_: Any, **__: Any) -> None:
    """Log nothing."""


def _optimizers(configure: Callable[[], Any]) -> Any:
    """What ``configure_optimizers`` returns; called with values if it asks for some, as for quantised states."""
    try:
        made = configure()
    except Exception as error:
        if not needs_values(error):
            raise
        made = with_values(configure)()
    for each in tree_leaves(made):
        if isinstance(each, Optimizer):
            leave_out_kernels(each)
    return made


def _setup(module: LightningModule, users: Callable[[str], None], mode: Any) -> Callable[[str], None]:
    """The module's ``setup``, which may make layers; called with values if it asks for some."""

    def setup(stage: str) -> None:
        try:
            users(stage)
        except Exception as error:
            if not needs_values(error):
                raise
            with_values(users)(stage)
            drop_memory(mode, module)

    return setup


def _first_batch(trainer: Trainer, data: LightningDataModule, mode: Any) -> _OneBatch:
    data.trainer = trainer
    name = type(data).__name__
    try:
        data.setup("fit")
        loaders = data.train_dataloader()
        batch, *_ = next(iter(CombinedLoader(loaders, "max_size_cycle")))
    except StopIteration:
        return _OneBatch(trainer, NoBatch(f"the train loader of {name} is empty"))
    except Exception as error:
        return _OneBatch(trainer, NoBatch(f"{name} gave no batch: {type(error).__name__}: {error}"))
    return _OneBatch(trainer, None, without_memory(mode, batch), loaders)


class _OneBatch:
    """A loader that returns one batch as often as the run's loader would return one."""

    def __init__(self, trainer: Trainer, problem: NoBatch | None, batch: Any = None, loaders: Any = ()) -> None:
        self._trainer, self._problem, self._batch, self._loaders = trainer, problem, batch, loaders
        for name in ("batch_size", "dataset"):  # a module may ask for them
            if hasattr(loaders, name):
                setattr(self, name, getattr(loaders, name))

    def __iter__(self) -> Iterator[Any]:
        if self._problem is not None:
            raise self._problem
        while True:
            yield self._batch

    def __len__(self) -> int:
        found = [_batches(each, self._trainer) for each in tree_leaves(self._loaders)]
        known = [each for each in found if each is not None]
        if not known:
            raise TypeError("the length of the train loader is not known")  # as a loader without one does
        return max(known)


def _batches(loader: Any, trainer: Trainer) -> int | None:
    """Batches of a loader on one rank, once Lightning has given it a sampler; None: not known."""
    whole = size_of(loader)
    if whole is None:
        return None
    sampler = getattr(loader, "sampler", None)
    kwargs: Mapping[str, Any] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    ranks = kwargs.get("num_replicas", 1)
    divides = trainer._accelerator_connector.use_distributed_sampler and not isinstance(sampler, DistributedSampler)
    if not isinstance(loader, DataLoader) or loader.batch_size is None or ranks == 1 or not divides:
        return whole
    samples = math.ceil(len(sampler) / ranks)  # type: ignore[arg-type]
    batches: float = samples / loader.batch_size
    return math.floor(batches) if loader.drop_last else math.ceil(batches)
