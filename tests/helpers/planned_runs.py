"""One small module in a dry run and on real ranks, both followed by the same callback."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

import stabletrain as st
from stabletrain.launch.cause import place_in_code
from stabletrain.planning.collectives import of_step
from stabletrain.planning.estimate import estimate
from stabletrain.planning.fit import trainer_of_plan
from stabletrain.planning.parts import Parts
from stabletrain.planning.plan import Plan
from stabletrain.planning.tracing import Traced, TraceSteps
from stabletrain.runtime.internals.shards import held_bytes
from stabletrain.workloads import CharGPT

BATCH, CONTEXT = 4, 16
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "single": lambda: SingleDeviceStrategy(torch.device("cpu")),
    "ddp": DDPStrategy,
    "ddp_zero1": st.DDPZeRO1Strategy,
    "fsdp2": st.FSDP2Strategy,
    "fsdp2_checkpoint": lambda: st.FSDP2Strategy(checkpoint_units=True),
    "zero2": lambda: st.FSDP2Strategy(reshard_after_forward=False),
    "hsdp": lambda: st.FSDP2Strategy(replicate=2),
    "tensor_parallel": lambda: st.TensorParallelStrategy(check=False),
    "fsdp2_tp": lambda: st.FSDP2TensorParallelStrategy(check=False),
}


class Again:
    """A loader of one batch again and again: tensors that are made within a step would be counted as the step's."""

    def __init__(self, batch: Any, count: int = 16) -> None:
        self.batch, self.count = batch, count

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.count)

    def __len__(self) -> int:
        return self.count


class Data(LightningDataModule):
    """Random tokens."""

    def train_dataloader(self) -> Again:
        return Again(torch.randint(0, 84, (BATCH, CONTEXT + 1)))


def module(optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> CharGPT:
    """A GPT of two blocks, with a width that two and four ranks divide."""
    torch.manual_seed(0)
    made = CharGPT(layers=2, heads=4, width=32, context=CONTEXT, sample_length=0)
    if optimizer is not None:
        made.configure_optimizers = lambda: optimizer(made.parameters())  # type: ignore[method-assign]
    return made


class ReadsValues(CharGPT):
    """Asks for the value of a tensor in its step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() > 0 else loss * 2


class StepsItself(CharGPT):
    """With manual optimization."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False


def small(kind: type[CharGPT]) -> Any:
    """A maker of a small module of a class."""
    return lambda: kind(layers=2, heads=4, width=32, context=16, sample_length=0)


def arguments(kind: str, processes: int, options: dict[str, Any]) -> dict[str, Any]:
    given = {"devices": processes, "num_nodes": 1, "max_steps": 3, **options}
    return {**given, "strategy": STRATEGIES[kind]()} if kind != "single" else given


def planned(
    kind: str,
    processes: int,
    options: dict[str, Any],
    make: Callable[[], LightningModule] = module,
    plugins: list[tuple[str, Callback]] | None = None,
    data: LightningDataModule | None = None,
    **how: Any,
) -> Plan:
    """The plan of the module with a strategy on so many processes."""

    def parts(mode: Any) -> Parts:
        return Parts(make(), data or Data(), arguments(kind, processes, options), plugins or [])

    return estimate("small", processes, 1, parts, lambda e: f"{place_in_code(e)}: {e}", **how)


def measured(
    folder: Path, kind: str, options: dict[str, Any], make: Callable[[], LightningModule] = module
) -> dict[str, Any]:
    """Run by each rank: what the same callback finds while the module trains."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    trace = TraceSteps(before=2)
    trainer = trainer_of_plan(arguments(kind, size, options), [], trace, on_ranks=True)
    trained = make()
    with contextlib.suppress(Traced):
        trainer.fit(trained, datamodule=Data())
    assert trace.peak is not None
    return {
        "parameters": held_bytes(trained.parameters()),
        "gradients": trace.gradients,
        "optimizer_state": trace.optimizer_state,
        "activations": trace.activations,
        "buckets": held_bytes(trace.buckets),
        "peak": trace.peak.total,
        "peak_parts": dict(trace.peak.parts),
        "peak_at": trace.peak.where,
        "collectives": [
            (each.kind, each.count, each.bytes) for each in of_step(trace.first, trace.last, trace.micro_batches)
        ],
    }
