"""Run by several ranks: trainings of `sharded_modules` under a strategy, many in one start of the processes."""

import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import sharded_modules
import torch
from fits import trainer
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from sharded_modules import Module, copied
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from stabletrain import FSDP2Strategy

STEPS = 6


class Case(NamedTuple):
    """One training.

    Args:
        module: name of a class in `sharded_modules`.
        strategy: ``ddp``, or arguments of FSDP2Strategy.
        options: of the Trainer.
        callbacks: names of functions in `sharded_on_ranks` that make lists of callbacks.
        rank_seeds: whether ranks initialise the module differently.
    """

    module: str
    strategy: Any = "ddp"
    options: tuple[tuple[str, Any], ...] = ()
    callbacks: str = ""
    rank_seeds: bool = False


class End(NamedTuple):
    """What a training ended with, on one rank; `error` is the traceback if it failed, and the rest is empty then."""

    losses: Sequence[float] = ()
    validated: Sequence[float] = ()
    tensors: Mapping[str, torch.Tensor] = MappingProxyType({})
    units: Sequence[str] = ()
    names: Sequence[str] = ()
    local: float = 1.0
    error: str = ""


def train(folder: Path, case: Case) -> tuple[Module, Trainer]:
    """One training of a case."""
    import os

    kind = getattr(sharded_modules, case.module)
    strategy = case.strategy
    if strategy == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo")
    else:
        strategy = FSDP2Strategy(process_group_backend="gloo", **strategy)
    made = globals()[case.callbacks]() if case.callbacks else []
    module: Module = kind(seed=int(os.environ["RANK"]) if case.rank_seeds else 0)
    options = {
        "devices": int(os.environ["WORLD_SIZE"]),
        "max_steps": STEPS,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "default_root_dir": folder,
        "use_distributed_sampler": False,
        **dict(case.options),
    }
    mine = trainer(*made, strategy=strategy, **options)
    data = DataLoader(torch.zeros(24, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        mine.fit(module, data, data if options["limit_val_batches"] else None)
    return module, mine


def ends(folder: Path, cases: Sequence[Case]) -> list[End]:
    """The ends of several trainings, one after another."""
    found = []
    for case in cases:
        try:
            module, mine = train(folder, case)
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            found.append(End(tensors={}, error=f"{type(error).__name__}: {error}\n{trace}"))
            continue
        sharded = [p for p in module.parameters() if isinstance(p, DTensor)]
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in module.parameters())
        units = list(mine.strategy.sharded.choice.units) if sharded else []  # type: ignore[attr-defined]
        names = [name for name, _ in module.named_parameters()]
        share = held / sum(p.numel() for p in module.parameters())
        found.append(End(module.losses, module.validated, copied(module), units, names, share))
    return found


def refused_by_trainers(folder: Path) -> dict[str, str]:
    """The messages of Trainers that FSDP2Strategy does not work for, by what is wrong."""
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    from stabletrain import UserError

    class TwoOptimizers(sharded_modules.Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.encoder.parameters()), torch.optim.SGD(self.head.parameters())

    used = FSDP2Strategy()
    attempts: dict[str, tuple[Any, Any, list[Any]]] = {
        "ema": (sharded_modules.Blocks(), FSDP2Strategy(), [EMAWeightAveraging()]),
        "swa": (sharded_modules.Blocks(), FSDP2Strategy(), [StochasticWeightAveraging(1e-2)]),
        "gather": (sharded_modules.Blocks(), FSDP2Strategy(gather="bf16"), []),
        "replicate": (sharded_modules.Blocks(), FSDP2Strategy(replicate=2), []),
        "two optimizers": (TwoOptimizers(), FSDP2Strategy(), []),
        "second": (sharded_modules.Blocks(), used, []),
    }
    data = DataLoader(torch.zeros(2, 1))
    options = {"max_steps": 1, "limit_val_batches": 0, "default_root_dir": folder}
    warnings.simplefilter("ignore")
    trainer(strategy=used, **options).fit(sharded_modules.Blocks(), data)
    texts = {}
    for name, (module, strategy, callbacks) in attempts.items():
        try:
            trainer(*callbacks, strategy=strategy, **options).fit(module, data)
        except UserError as error:
            texts[name] = str(error)
    return texts


def bf16_mixed_with_norms() -> list[Any]:
    from stabletrain import SetPrecision

    return [SetPrecision("bf16_mixed", keep_fp32=["LayerNorm"])]


def bf16_true_with_norms() -> list[Any]:
    from stabletrain import SetPrecision

    return [SetPrecision("bf16_true", keep_fp32=["LayerNorm"], allow_stalling=True)]


def checkpointed() -> list[Any]:
    from stabletrain import CheckpointActivations

    return [CheckpointActivations()]
