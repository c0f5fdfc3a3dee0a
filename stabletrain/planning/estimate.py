"""From a module, a data module and the arguments of a Trainer to the plan of the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stabletrain.core.lengths import RunLength
from stabletrain.errors import UserError
from stabletrain.planning import collectives, formula, state
from stabletrain.planning.fit import fit, trainer_of_plan, values_of_generators
from stabletrain.planning.parts import Parts
from stabletrain.planning.plan import Collective, PerRank, Plan
from stabletrain.planning.plugins import plans_of
from stabletrain.planning.tracing import Traced, TraceSteps, fill_state
from stabletrain.runtime.internals import shards
from stabletrain.runtime.internals.fake_world import bucket_sizes, fake_world


class CannotPlan(Exception):
    """The module was not set up, so that nothing is known; ``__cause__`` says why."""


def estimate(
    recipe: str,
    processes: int,
    nodes: int,
    make: Callable[[Any], Parts],
    place: Callable[[Exception], str],
    *,
    on_gpu: bool = False,
) -> Plan:
    """Set up a run of any size in this process, and trace two of its steps. Nothing is written.

    Args:
        recipe: name of the run's recipe.
        processes: per node.
        nodes: of the run.
        make: builds the parts, given the mode of the fake world; called within it.
        place: the text about an exception that ended the trace, with file and line of the user's code.
        on_gpu: whether optimizers use the kernels that are their default on a GPU.

    Raises:
        UserError: if the strategy cannot be used as it is configured.
        CannotPlan: if the module cannot be set up without values.
    """
    with fake_world(processes * nodes, values_of_generators()) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = make(mode)
        plugins = [each for _, each in parts.plugins]
        trace = TraceSteps(plugins, on_gpu=on_gpu)
        trainer = trainer_of_plan(parts.arguments, plugins, trace)
        for each in plugins:
            if (prepare := getattr(each, "prepare_trainer", None)) is not None:
                prepare(trainer, parts.module)
        stopped: Exception | None = None
        try:
            fit(trainer, parts.module, parts.data, mode)
        except Traced:
            pass
        except UserError:
            raise
        except Exception as error:
            if not trace.has_optimizer:
                raise CannotPlan(place(error)) from error
            stopped = error
            shards.reshard(parts.module)  # an exception in the step has left parameters whole
        found = _Found(trainer, parts.module, trace, None if stopped is None else place(stopped))
        plan = found.plan(recipe, processes, nodes)
        length = trace.length or RunLength()
        said = plans_of(parts.plugins, trainer, plan.per_rank, plan.micro_batches, length)
        return replace(plan, plugins=said)


class _Found:
    """What is known after the fit has ended.

    Args:
        trainer: of the fit.
        module: as its strategy has made it.
        trace: of the steps.
        stopped: what ended the trace early; None: it is complete.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, trace: TraceSteps, stopped: str | None) -> None:
        self.trainer, self.module, self.trace, self.stopped = trainer, module, trace, stopped
        self.strategy: Any = trainer.strategy
        self.notes: list[str] = []
        options = getattr(self.strategy, "options", None)
        gather = getattr(options, "gather", None)
        self.groups = state.groups(module, None if gather is None else gather.itemsize)
        self.offloads = bool(getattr(options, "offload", False))

    def plan(self, recipe: str, processes: int, nodes: int) -> Plan:
        """The plan, without what plugins do and without a verdict."""
        parameters = list(self.module.parameters())
        length, per_rank = self.trace.length, self._per_rank()
        whole = [*parameters, *self.module.buffers()]
        checkpoint = None
        if per_rank.optimizer_state is not None:
            checkpoint = _whole_bytes([*whole, *state.optimizer_tensors(self.trainer.optimizers, self.module)])
            if hasattr(self.strategy, "divides_optimizer"):
                checkpoint = None  # each rank has some of the state
        return Plan(
            recipe=recipe,
            processes=processes,
            nodes=nodes,
            strategy=type(self.strategy).__name__,
            precision=str(self.trainer.precision),
            optimizer=", ".join(_name(each) for each in self.trainer.optimizers) or "none",
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            groups=self.groups,
            per_rank=per_rank,
            micro_batches=self.trace.micro_batches,
            collectives=self._collectives(),
            source="traced" if self.stopped is None else "formula",
            stopped_by=self.stopped,
            checkpoint_bytes=checkpoint,
            steps=None if length is None else length.total_steps,
            steps_per_epoch=None if length is None else length.steps_per_epoch,
            readers=_readers(self.trainer),
            samples=self.trace.samples,
            tokens=self.trace.tokens,
            rate=self._rate(),
            scheduler=", ".join(type(each.scheduler).__name__ for each in self.trainer.lr_scheduler_configs),
            notes=[*self.notes, *self._notes()],
        )

    def _rate(self) -> float | None:
        """The learning rate of the first group of parameters; None: it has none, or it is a tensor."""
        groups = [group for each in self.trainer.optimizers for group in each.param_groups]
        rate = groups[0].get("initial_lr", groups[0].get("lr")) if groups else None
        return None if rate is None or isinstance(rate, Tensor) else float(rate)

    def _per_rank(self) -> PerRank:
        trace, module = self.trace, self.module
        traced = self.stopped is None
        trained = [p for p in module.parameters() if p.requires_grad]
        wrapped = trace.wrapped
        is_ddp = isinstance(wrapped, DistributedDataParallel)
        sharded = [each for each in self.groups if each.whole_bytes]
        peak = trace.peak if traced else None
        return PerRank(
            parameters=shards.held_bytes(module.parameters()),
            buffers=shards.held_bytes(module.buffers()),
            gradients=trace.gradients if traced else shards.held_bytes(trained),
            optimizer_state=trace.optimizer_state if traced else self._state_without_a_step(),
            largest_group=max((each.whole_bytes for each in sharded), default=0),
            buckets=shards.held_bytes(trace.buckets) if traced else sum(bucket_sizes(wrapped)) if is_ddp else 0,
            window_gradients=trace.window_gradients if traced else self._window_without_a_step(),
            activations=trace.activations if traced else None,
            batch=trace.batch if traced else None,
            peak=None if peak is None else peak.total,
            peak_parts={} if peak is None else peak.parts,
            peak_at=None if peak is None else peak.where,
        )

    def _state_without_a_step(self) -> int | None:
        try:
            fill_state(list(self.trainer.optimizers), self.module)
        except Exception as error:
            self.notes.append(
                f"the optimizer's state is not known: {type(error).__name__} in a step of "
                f"{type(self.trainer.optimizers[0]).__name__} without values"
            )
            return None
        return shards.held_bytes(state.optimizer_tensors(self.trainer.optimizers, self.module))

    def _window_without_a_step(self) -> int:
        sharded = getattr(self.strategy, "sharded", None)
        keeps = self.trace.micro_batches > 1 and getattr(self.strategy, "defer", False)
        return int(sharded.window_bytes) if keeps and sharded is not None else 0

    def _collectives(self) -> list[Collective]:
        if self.stopped is not None:
            wrapped, count = self.trace.wrapped, self.trace.micro_batches
            found = formula.messages(self.strategy, wrapped, self.module, self.groups, count)
            if found is None:
                self.notes.append("the messages of tensor parallelism depend on the step, and are not known")
            return found or []
        found = collectives.of_step(self.trace.first, self.trace.last, self.trace.micro_batches)
        wrapped = self.trace.wrapped
        if not isinstance(wrapped, DistributedDataParallel):
            return found
        # the trace keeps the buckets of the first step, in which there is one
        more = len(bucket_sizes(wrapped)) - len(self.trace.buckets)
        return [replace(each, count=each.count + more) if each.kind == "all-reduce" else each for each in found]

    def _notes(self) -> Iterator[str]:
        if self.offloads:
            yield "with offload, parameters, gradients and optimizer state are in main memory; the peak counts them"
        if self.trace.micro_batches > 2 and self.stopped is None:
            yield f"2 of {self.trace.micro_batches} micro-batches of a step were traced; the others are like the first"


def _name(optimizer: Any) -> str:
    """The name of an optimizer; Lightning has one for modules that have none."""
    name = type(optimizer).__name__
    return "none" if name == "_MockOptimizer" else name


def _readers(trainer: Trainer) -> int:
    """Ranks that read other samples than the others: with tensor parallelism, several ranks share a batch."""
    dealt = trainer.distributed_sampler_kwargs if trainer.world_size > 1 else None
    return int((dealt or {}).get("num_replicas", 1 if dealt is None else trainer.world_size))


def _whole_bytes(tensors: Sequence[Any]) -> int:
    """Bytes of the whole tensors, each counted once."""
    return sum(each.numel() * each.element_size() for each in {id(each): each for each in tensors}.values())
