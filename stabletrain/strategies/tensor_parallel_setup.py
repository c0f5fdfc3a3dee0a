"""What tensor parallelism needs before and after a module is cut: equal ranks, a copy to compare with, an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.runtime.internals.model_parallel import refuse_device_decisions
from stabletrain.runtime.records.event_log import logger
from stabletrain.strategies.tensor_parallel_check import UNCHECKED, PlanCheck
from stabletrain.strategies.tensor_parallel_plan import Assignment


def make_equal(module: nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0. A collective."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), 0)


def use_equal_random_numbers(mesh: DeviceMesh) -> None:
    """Give the ranks of a group the random generators of its first: dropout of a whole tensor is then the same there.

    Args:
        mesh: of the group.
    """
    group, state = mesh.get_group(), [rng.capture()]
    dist.broadcast_object_list(state, dist.get_global_rank(group, 0), group=group)
    rng.restore(state[0])


def prepare_check(
    module: LightningModule, assigned: Assignment, mesh: DeviceMesh, owner: str, wanted: bool
) -> PlanCheck | None:
    """Copy a module that is about to be cut, to compare it with the cut one at the first step.

    Args:
        module: not yet cut.
        assigned: how it will be cut.
        mesh: of all ranks.
        owner: name of the strategy's class, for messages.
        wanted: whether to compare; otherwise that is logged.

    Raises:
        UserError: if the module cannot be copied.
    """
    if not wanted:
        if dist.get_rank() == 0:
            logger.warning(
                "%s(check=False): the plan is not compared with the whole module; a wrong one trains a wrong module",
                owner,
            )
        return None
    name = type(module).__name__
    try:
        whole = copy.deepcopy(module, {id(mesh): mesh})
    except Exception as error:
        raise UserError(
            f"{owner}: {name} cannot be copied ({type(error).__name__}: {error}), so its plan cannot be checked. "
            f"{UNCHECKED}"
        ) from error
    return PlanCheck(whole, assigned, mesh["tensor_parallel"], owner)


def check_steps_itself(module: LightningModule, owner: str) -> None:
    """Refuse a module with manual optimization, whose ``training_step`` the check would call.

    Args:
        module: that is trained.
        owner: name of the strategy's class, for messages.
    """
    if not module.automatic_optimization:
        raise UserError(
            f"{owner}: the plan is checked by a call of training_step, in which {type(module).__name__} would step by "
            f"hand. {UNCHECKED}"
        )


def check_parameters(optimizers: Iterable[Optimizer], replaced: Collection[Tensor], owner: str) -> None:
    """Refuse an optimizer of the parameters that the module had before it was cut: they are not its own any more.

    Args:
        optimizers: of the fit.
        replaced: these parameters.
        owner: name of the strategy's class, for messages.
    """
    for optimizer in optimizers:
        if any(p in replaced for group in optimizer.param_groups for p in group["params"]):
            raise UserError(
                f"{owner}: {type(optimizer).__name__} has the parameters from before the module was cut, and would "
                "train nothing. Make it in configure_optimizers, from self.parameters()"
            )


def use_single_kernels(optimizers: Iterable[Optimizer]) -> list[str]:
    """Set ``fused`` and ``foreach`` to False where a group has whole and cut parameters (DTensor).

    Torch's kernels for several tensors at once do not take both together. The arithmetic is the same.

    Args:
        optimizers: of the module that has been cut, also after their state has been loaded.

    Returns:
        What has been changed, as text.
    """
    changed = []
    for optimizer in optimizers:
        groups = optimizer.param_groups
        is_mixed = any(len({getattr(p, "device_mesh", None) for p in group["params"]}) > 1 for group in groups)
        for option in ("fused", "foreach") if is_mixed else ():
            if any(group.get(option) for group in groups):
                for group in groups:
                    group[option] = False
                changed.append(f"{type(optimizer).__name__}({option}=True)")
        if is_mixed:
            refuse_device_decisions(optimizer)
    return changed


def log_single_kernels(changed: Iterable[str], owner: str) -> None:
    """Log what `use_single_kernels` has changed, on the first rank.

    Args:
        changed: from it.
        owner: name of the strategy's class.
    """
    for each in changed if dist.get_rank() == 0 else ():
        logger.info("%s: %s updates one tensor after another: torch has no kernel for whole and cut ones", owner, each)
