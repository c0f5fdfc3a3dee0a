"""Trace two optimizer steps of a fit: the first fills the optimizer's state, the second is counted.

The same callback measures ranks that train: so the numbers of a dry run are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from stabletrain.core.lengths import RunLength
from stabletrain.planning.collectives import CountCollectives, Counts
from stabletrain.planning.state import optimizer_tensors
from stabletrain.runtime.internals.fake_world import NotTraceable, reduce_buckets
from stabletrain.runtime.internals.memory_tracking import Peak, StepTracker
from stabletrain.runtime.internals.shards import held_bytes
from stabletrain.runtime.internals.state import averages_in
from stabletrain.runtime.run_length import run_length
from stabletrain.runtime.windows.batches import samples_and_tokens

_TRACED = 2
"""Micro-batches of a step that are traced at most: the first ones of a step are all alike."""


class Traced(BaseException):
    """Ends a fit after the traced steps; no `Exception`, which a module might catch."""


class TraceSteps(Callback):
    """Follows memory and messages of the second optimizer step.

    Args:
        plugins: of the run; those of them that choose the windows of accumulation are asked for their sizes.
        stops: whether to end the fit by `Traced` then.
        on_gpu: whether to let optimizers use the kernels that are their default on a GPU.
        before: steps before the one that is followed. On real ranks DistributedDataParallel needs two: it forms its
            buckets anew in the second one, and a fake world has those of the first.
    """

    def __init__(
        self, plugins: Sequence[Callback] = (), *, stops: bool = True, on_gpu: bool = False, before: int = 1
    ) -> None:
        self.plugins, self.stops, self.on_gpu, self.before = plugins, stops, on_gpu, before
        self.has_optimizer = False
        """Whether the strategy has set up module and optimizer."""
        self.micro_batches = 1
        """In an optimizer step of the run; at most two of them are traced."""
        self.length: RunLength | None = None
        self.gradients = self.optimizer_state = self.activations = self.window_gradients = self.batch = 0
        """Bytes on this rank."""
        self.samples: int | None = None
        """Rows of a micro-batch."""
        self.tokens: int | None = None
        """Of a micro-batch; None: it has none."""
        self.first: Counts = {}
        """Collectives of a micro-batch that is not the last one of its step."""
        self.last: Counts = {}
        """Collectives of the last one."""
        self.peak: Peak | None = None
        self.wrapped: Any = None
        """The module as the strategy calls it; Lightning takes the wrapper off at the fit's end."""
        self.buckets: list[Tensor] = []
        self._stack = ExitStack()
        self._tracker: StepTracker | None = None
        self._counter = CountCollectives()
        self._seen = self._traced = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The strategy is ready."""
        self.has_optimizer = True
        self.wrapped = trainer.strategy.model
        if isinstance(self.wrapped, DistributedDataParallel):
            reduce_buckets(self.wrapped, self._bucket)

    def _bucket(self, bucket: Tensor) -> None:
        if self._tracker is None and self._seen >= (self.before - 1) * self._traced:
            self.buckets.append(bucket)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose how many micro-batches of a step are traced."""
        if not pl_module.automatic_optimization:
            raise NotTraceable("the module steps its optimizers itself (manual optimization)")
        for each in self.plugins:
            plan = getattr(each, "window_plan", lambda _: None)(trainer)
            if plan is not None:
                trainer.accumulate_grad_batches = max(stage.size for stage in plan)
        self.length, self.micro_batches = run_length(trainer), trainer.accumulate_grad_batches
        for optimizer in trainer.optimizers:  # those that average weights have a mode, and begin in that of evaluation
            getattr(optimizer, "train", lambda: None)()
            for group in optimizer.param_groups if self.on_gpu else ():
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
        self._traced = trainer.accumulate_grad_batches = min(self.micro_batches, _TRACED)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forward and backward come next."""
        self.samples, self.tokens = samples_and_tokens(batch)
        if self._tracker is not None:
            self._tracker.batch_begins()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """What the forward pass has kept."""
        if self._tracker is not None:
            self.activations = max(self.activations, self._tracker.held("activations"))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The gradients are complete."""
        self.gradients = held_bytes(p.grad for p in pl_module.parameters() if p.grad is not None)
        if self._tracker is not None:
            self._tracker.update_begins()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin to follow after the first step; end after the second."""
        self._seen += 1
        end = (self.before + 1) * self._traced
        if self._seen == end - self._traced:
            self._begin(trainer, pl_module, batch)
        elif self._seen == end - 1 and self._traced > 1:
            self.first = self._counted()
            assert self._tracker is not None
            whole = self._tracker.held("whole gradients") + self._tracker.held("gradients")
            self.window_gradients = whole
        elif self._seen == end:
            self._end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop following."""
        self._stack.close()

    def _begin(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        tensors = [each for each in tree_leaves(batch) if isinstance(each, Tensor)]
        self.batch = held_bytes(tensors)
        held = [*tensors, *self.buckets, *optimizer_tensors(trainer.optimizers, module)]
        for each in trainer.callbacks:  # type: ignore[attr-defined]
            held += [p for average in averages_in(each, module) for p in average.parameters()]
        self._tracker = StepTracker(module, list(trainer.optimizers), held)
        self._stack.enter_context(self._tracker)
        self._stack.enter_context(self._counter)

    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stack.close()
        assert self._tracker is not None
        self.last, self.peak = self._counted(), self._tracker.peak
        self.optimizer_state = held_bytes(optimizer_tensors(trainer.optimizers, module))
        if self.window_gradients:  # of sharded gradients, those that the optimizer gets are counted already
            self.window_gradients = max(0, self.window_gradients - self.gradients)
        self._tracker = None
        if self.stops:
            raise Traced

    def _counted(self) -> Counts:
        counts, self._counter.counts = self._counter.counts, {}
        return counts


def fill_state(optimizers: list[Optimizer], module: LightningModule) -> None:
    """Step with gradients of zero, so that the optimizers have their state; in a fake world, without a batch.

    Args:
        optimizers: of the run.
        module: whose parameters they update.
    """
    for p in module.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
