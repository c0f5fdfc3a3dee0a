"""Errors for ranks that train different weights: nothing averages a gradient, or the copies of a parameter differ."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime.guard import replicas
from stabletrain.runtime.guard.replicas import Difference
from stabletrain.runtime.internals.ddp import averages_weights_only
from stabletrain.runtime.ranks import Ranks

_NAMED = 4
"""Parameters that a message names."""


class ReplicaCheck:
    """Checks in a fit on several ranks that all of them train the same weights.

    All of them raise the same error. On one rank nothing is checked.

    Args:
        trainer: in a fit; its strategy has set up the model.
        module: that is trained.
        ranks: of the fit.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, ranks: Ranks) -> None:
        self._trainer, self._module, self._ranks = trainer, module, ranks
        self._gradients: dict[int, int] = {}
        self._waiting: set[int] = set()
        """Optimizers without an applied step that moved weights."""
        self._moves: set[int] = set()
        self._due = False

    def open(self, optimizers: Sequence[Optimizer]) -> None:
        """The optimizers exist: check that something averages the gradients.

        Args:
            optimizers: of the module.

        Raises:
            UserError: if nothing keeps the copies of a trained parameter equal.
        """
        if self._ranks.size == 1:
            return
        if averages_weights_only(self._trainer):
            raise UserError(
                "stabletrain plugins: DDPStrategy(ddp_comm_state=PostLocalSGDState(...)) averages gradients within a "
                "group of ranks only, so each group would decide for itself which steps to drop and clip. Remove "
                "ddp_comm_state and model_averaging_period, or remove the plugins."
            )
        self._waiting = set(range(len(optimizers)))
        for each in optimizers:
            self._check_averaged([p for group in each.param_groups for p in group["params"]])

    def begin(self) -> None:
        """The weights are loaded: compare the copies. A collective.

        Raises:
            UserError: if copies of a parameter differ.
        """
        if self._ranks.size > 1 and (found := replicas.differing_copies(self._ranks, self._module)):
            raise UserError(_differ_at_start(found))

    def before_step(self, index: int, optimizer: Optimizer, parameters: Sequence[Tensor], gradients: int) -> None:
        """An optimizer is going to step.

        Args:
            index: of the optimizer.
            optimizer: itself.
            parameters: those that it has now.
            gradients: how many of them have one.

        Raises:
            UserError: if nothing averages the gradient of a parameter that had none before.
        """
        if self._ranks.size == 1:
            return
        if self._gradients.get(index) != gradients:
            self._gradients[index] = gradients
            self._check_averaged([p for p in parameters if p.grad is not None])
        if index in self._waiting and any(float(group["lr"]) for group in optimizer.param_groups if "lr" in group):
            self._moves.add(index)

    def after_step(self, index: int) -> None:
        """A step of an optimizer was applied: if it was the first that moved weights, `compare` is due."""
        if index in self._moves:
            self._moves.remove(index)
            self._waiting.remove(index)
            self._due = True

    def compare(self) -> None:
        """Compare the copies if that is due. A collective.

        Raises:
            UserError: if copies of a parameter differ.
        """
        if not self._due:
            return
        self._due = False
        found = replicas.differing_copies(self._ranks, self._module)
        if found and self._ranks.sees_same_data and self._ranks.device.type != "cpu":
            close = replicas.differ_by_rounding(self._ranks, self._module, [each.name for each in found])
            found = [each for each in found if each.name not in close]
        if found:
            raise UserError(_differ_after_step(found))

    def _check_averaged(self, parameters: Sequence[Tensor]) -> None:
        local = [p for p in parameters if p.requires_grad and self._ranks.placement(p) == "local"]
        if local:
            names: dict[Tensor, str] = {p: name for name, p in self._module.named_parameters()}
            raise UserError(self._averaged_by_nothing([names.get(p, f"parameter {i}") for i, p in enumerate(local)]))

    def _averaged_by_nothing(self, names: Sequence[str]) -> str:
        kind = type(self._trainer.strategy).__name__
        return (
            f"stabletrain plugins cannot train {_listed(names)} on {self._ranks.size} ranks: nothing averages the "
            f"gradient{'s of these plain parameters' if len(names) > 1 else ' of this plain parameter'} over the ranks "
            f"of {kind}, so the copies would drift apart and each rank would decide on numbers of its own. "
            "DistributedDataParallel averages what is trainable when the fit begins and what it is not told to ignore; "
            "FSDP2 averages what it shards. Shard the whole module in configure_model (fully_shard(self.net), not a "
            "part of it), use strategy=ddp, or let all parameters require gradients from the start (with "
            "strategy=ddp_unused). If your strategy averages them itself, set its attribute averages_plain_gradients = "
            "True."
        )


def _differ_at_start(found: Sequence[Difference]) -> str:
    return (
        f"The ranks begin with different weights: {_listed([str(each) for each in found])} {_differ(found)}. Expected "
        "the same bits on all ranks. Seed all ranks alike before the module is made (seed_everything, config key "
        "seed), load the same checkpoint on all, or use strategy=ddp, which sends the weights of rank 0 to all ranks."
    )


def _differ_after_step(found: Sequence[Difference]) -> str:
    return (
        f"The ranks have different weights after the first step: {_listed([str(each) for each in found])} "
        f"{_differ(found)}, so they would drift apart. Either the gradients differ (in a tensor-parallel region, a "
        "gradient that covers this rank's part only: sum it over the group; code that only one rank runs), or the "
        "optimizer draws random numbers (stochastic rounding: seed all ranks alike), or a hook changes weights on one "
        "rank only."
    )


def _differ(found: Sequence[Difference]) -> str:
    return "differs" if len(found) == 1 else "differ"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
