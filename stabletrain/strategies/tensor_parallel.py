"""Tensor parallelism for a module that stays as it is: a plan says which layers are cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.runtime.internals import model_parallel as internals
from stabletrain.runtime.internals.packages import ModelParallelStrategy
from stabletrain.runtime.internals.stacked_pieces import for_checkpoint
from stabletrain.runtime.internals.trainer import has_all_modules
from stabletrain.strategies.tensor_parallel_check import PlanCheck
from stabletrain.strategies.tensor_parallel_layers import GradientSums, cut
from stabletrain.strategies.tensor_parallel_loading import load_checkpoint
from stabletrain.strategies.tensor_parallel_plan import Assignment, assign, plan_of
from stabletrain.strategies.tensor_parallel_setup import (
    check_parameters,
    check_steps_itself,
    log_single_kernels,
    make_equal,
    prepare_check,
    use_equal_random_numbers,
    use_single_kernels,
)
from stabletrain.strategies.waiting import waiting_limit

"""Lightning's."""


@dataclass
class _Cut:
    """What is known of a module that is cut.

    Args:
        degree: over how many ranks.
        assigned: how.
        check: still to be run; None: there is nothing to check any more.
    """

    degree: int
    assigned: Assignment
    check: PlanCheck | None


_CUT: WeakKeyDictionary[nn.Module, _Cut] = WeakKeyDictionary()
"""The modules that are cut already, as they are after a fit or a validation."""


class TensorParallelStrategy(ModelParallelStrategy):
    """Cuts layers over the processes, which all see the same batches, and compute each step together.

    Before the first step, the module as it was and the cut module are compared on a few rows of the first batch:
    outputs and gradients must agree within 1e-5. docs/tensor_parallel.md says how to write a plan.

    Args:
        plan: pattern of names of the LightningModule's submodules -> ``"colwise"``, ``"colwise:3"``, ``"rowwise"``,
            ``"partial"`` or ``"divide"``; None: the module's attribute ``tensor_parallel_plan``.
        size: number of processes over which layers are cut; None: all.
        check: compare the cut module with the whole one before the first step. That needs memory for the whole module
            on each process.
        process_group_backend: None: nccl on GPUs, gloo on the CPU.
        timeout: seconds, or a timedelta, that a process waits for the others, > 0; None: 5 minutes, or what the
            command line has in ``launch.timeout``.

    Raises:
        UserError: when training starts, for a plan or a number of processes that does not fit the module; at the
            first step, for a plan that makes the module compute something else.
    """

    averages_plain_gradients = True
    """Parameters that are not cut have the same gradient on all ranks: computed from the same batch, or added up."""

    def __init__(
        self,
        plan: Mapping[str, str] | None = None,
        size: int | None = None,
        check: bool = True,
        process_group_backend: str | None = None,
        timeout: float | timedelta | None = None,
    ) -> None:
        limit = waiting_limit(timeout, type(self).__name__, "strategy.strategy")
        super().__init__(process_group_backend=process_group_backend, timeout=limit)
        self.timeout_was_given = timeout is not None
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise UserError(
                f"{type(self).__name__}(size=...): expected a number of processes, at least 1, or None, got {size!r} "
                "(config key strategy.strategy.size)"
            )
        self.plan, self.size, self.check = plan, size, check
        self._gradient_sums: GradientSums | None = None
        self._plan_check: PlanCheck | None = None

    # ---- sizes and the plan, before anything is cut -----------------------------------------------------------------

    def mesh_sizes(self, processes: int) -> tuple[int, int]:
        """The number of groups that see different data, and of processes in each.

        Args:
            processes: of the run.

        Raises:
            UserError: if the number of processes does not fit ``size``.
        """
        if self.size not in (None, processes):
            raise UserError(
                f"{type(self).__name__}(size={self.size}): expected {self.size} processes, got {processes} (config key "
                "strategy.strategy.size). Use as many, or strategy=fsdp2_tp, which has groups of them"
            )
        return 1, processes

    def check_module(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise an error for a plan that does not fit the module; nothing is changed and no process is waited for.

        Args:
            trainer: that has this strategy.
            module: not yet cut.

        Raises:
            UserError: see `assign`.
        """
        self.check_plan(module, trainer.world_size)

    def check_plan(self, module: LightningModule, processes: int) -> None:
        """Raise an error for a plan that does not fit the module; nothing is changed and no process is waited for.

        Args:
            module: not yet cut.
            processes: of the run.

        Raises:
            UserError: see `assign`.
        """
        if module not in _CUT and has_all_modules(module):
            self._assign(module, processes)

    def _assign(self, module: LightningModule, processes: int) -> Assignment:
        _, degree = self.mesh_sizes(processes)
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise UserError(
                f"{type(self).__name__}: {type(module).__name__} is sharded already, by its configure_model or an "
                "earlier run. Use Lightning's ModelParallelStrategy for a module that shards itself, or a new module"
            )
        name = type(self).__name__
        assigned = assign(module, plan_of(module, self.plan, name), degree, name)
        fused = [layer for layer, stacked in assigned.colwise.items() if stacked > 1]
        if fused and not internals.cuts_stacked(torch.__version__):
            raise UserError(
                f"{name}: {fused[0]} holds several matrices one below the other (style 'colwise:N'), which torch "
                f"{torch.__version__} cannot divide; expected torch 2.12 or newer. Install it, or give the module a "
                "Linear layer for each matrix (config key strategy.strategy.plan)"
            )
        return assigned

    # ---- setup ------------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Start the processes' communication, and make the device mesh."""
        groups, degree = self.mesh_sizes(self.num_processes * self.num_nodes)
        internals.set_mesh_sizes(self, groups, degree)
        # Lightning seeds again here; with one group, the data's order and all else stay those of a single process
        with rng.preserved() if groups == 1 else nullcontext():
            super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Cut the module, then make the optimizers."""
        assert self.accelerator is not None
        assert self.model is not None
        module = cast(LightningModule, self.lightning_module)
        self.accelerator.setup(trainer)
        is_fit = trainer.state.fn == "fit"
        if is_fit and self.check:
            check_steps_itself(module, type(self).__name__)
        whole = set(module.parameters())
        known = self._known(module) or self._cut(module)
        self._plan_check = known.check if is_fit else None
        if self.device_mesh["data_parallel"].size() == 1:
            # all ranks see all data, in the order in which one process would; Lightning's sampler would shuffle it
            internals.use_own_sampler(trainer)
        self._gradient_sums = GradientSums(self._sums(module, known.assigned))
        use_equal_random_numbers(self.device_mesh["tensor_parallel"])
        self.barrier()
        if is_fit:
            self.setup_optimizers(trainer)
            check_parameters(self.optimizers, whole - set(module.parameters()), type(self).__name__)
            log_single_kernels(use_single_kernels(self.optimizers), type(self).__name__)
        self.setup_precision_plugin()

    def _known(self, module: LightningModule) -> _Cut | None:
        """What is known of a module that is cut already; None: it is not."""
        known, degree = _CUT.get(module), self.device_mesh["tensor_parallel"].size()
        if known is not None and known.degree != degree:
            raise UserError(
                f"{type(self).__name__}: {type(module).__name__} is cut for {known.degree} processes already, not for "
                f"{degree}; make a new one"
            )
        return known

    def _cut(self, module: LightningModule) -> _Cut:
        """Cut a module, and keep a copy of the whole one for the check."""
        assigned, mesh = self._assign(module, self.world_size), self.device_mesh["tensor_parallel"]
        internals.materialize(module, self.root_device)
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        make_equal(module)
        check = prepare_check(module, assigned, self.device_mesh, type(self).__name__, self.check)
        cut(module, assigned, mesh)
        self._shard_further(module, assigned)
        _CUT[module] = _Cut(mesh.size(), assigned, check)
        return _CUT[module]

    def _shard_further(self, module: LightningModule, assigned: Assignment) -> None:
        """Shard the cut module over the ranks that see different data; here there are none."""

    def _sums(
        self, module: LightningModule, assigned: Assignment
    ) -> Iterator[tuple[Tensor, list[dist.ProcessGroup], float]]:
        """The parameters whose gradients are added over groups of ranks, and the number by which the sum is divided."""
        group = self.device_mesh["tensor_parallel"].get_group()
        for name in assigned.partial:
            yield module.get_parameter(name), [group], 1

    # ---- training ---------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; at the first step the plan is checked with the same batch before."""
        if self._plan_check is not None:
            module = cast(LightningModule, self.lightning_module)
            if self._plan_check.run(module, module.trainer, args):
                self._plan_check = _CUT[module].check = None
        return super().training_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Make gradients that cover a part only arrive as sums."""
        super().pre_backward(closure_loss)
        if self._gradient_sums is not None:
            self._gradient_sums.attach()

    def teardown(self) -> None:
        """Remove what only this strategy needs."""
        if self._gradient_sums is not None:
            self._gradient_sums.detach()
        self._gradient_sums = self._plan_check = None
        super().teardown()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save a sharded checkpoint, in which each tensor has its whole shape."""
        for key in ("state_dict", "optimizer_states"):
            if key in checkpoint:
                checkpoint[key] = for_checkpoint(checkpoint[key])
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a sharded checkpoint, of any number of processes, or a single file of the whole module."""
        module = cast(LightningModule, self.lightning_module)
        path = Path(self.broadcast(str(checkpoint_path)))
        loaded = load_checkpoint(path, module, self.optimizers, module.strict_loading, weights_only)
        use_single_kernels(self.optimizers)  # the state of an optimizer contains its options
        return loaded
