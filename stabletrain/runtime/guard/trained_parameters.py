"""The parameters that an optimizer trains now: groups and parameters may be added and removed during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.runtime.internals import state as state_internals


class Groups(NamedTuple):
    """The parameter groups of an optimizer at one step.

    Args:
        holders: the optimizer and those that it holds.
        groups: of each of them: the dictionaries themselves, each with its parameters then.
        trained: the module's parameters, and whether each had ``requires_grad``.
    """

    holders: list[Optimizer]
    groups: list[list[tuple[dict[str, Any], list[Tensor]]]]
    trained: dict[Tensor, bool]


class _Late(NamedTuple):
    """Parameters that a rollback has taken out of the optimizer, because they were added later.

    Args:
        group: where they were.
        parameters: themselves.
        added: applied steps when they were first seen.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    added: int


class TrainedParameters:
    """Reads the parameters of an optimizer anew at each step, and takes them back to where a snapshot was captured.

    Args:
        optimizer: of the fit.
        module: that has the parameters; they are named as in it.
        applied: returns the number of applied steps so far; it is asked only when the parameters are others.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module, applied: Callable[[], int]) -> None:
        self._optimizer, self._module, self._applied = optimizer, module, applied
        self._names: dict[Tensor, str] = {}
        self._known: list[Tensor] = []
        self._ids: list[int] = []
        self._added: dict[Tensor, int] = {}
        self._first: dict[Tensor, Tensor] = {}  # values of parameters that the module did not have at the beginning
        self._late: list[_Late] = []
        self._of_module = set(module.parameters())
        self.read()

    def read(self) -> list[Tensor]:
        """The parameters of all groups, in the optimizer's order; call it between backward and update."""
        groups = self._optimizer.param_groups
        parameters = groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]
        ids = [*map(id, parameters)]
        if ids == self._ids:
            return self._known
        applied = self._applied() if self._ids else 0
        for p in parameters:
            self._added.setdefault(p, applied)
            if self._ids and p not in self._of_module and p not in self._first:
                self._first[p] = p.detach().clone()
        self._known, self._ids = list(parameters), ids  # while they are kept, no other tensor can have such an id
        return self._known

    def names(self, parameters: Sequence[Tensor]) -> list[str]:
        """The names of parameters in the module; ``parameter i`` for one that is not in the module."""
        if any(p not in self._names for p in parameters):
            self._names = {p: f"parameter {i}" for i, p in enumerate(parameters)}
            self._names.update((p, name) for name, p in self._module.named_parameters())
        return [self._names[p] for p in parameters]

    # ---- going back -------------------------------------------------------------------------------------------------

    def capture(self) -> Groups:
        """The groups and the parameters in them now."""
        holders = state_internals.state_holders(self._optimizer, self._module)
        groups = [[(group, list(group["params"])) for group in each.param_groups] for each in holders]
        return Groups(holders, groups, {p: p.requires_grad for p in self._module.parameters()})

    @torch.no_grad()
    def restore(self, groups: Groups, now: int, rewind: bool) -> None:
        """Restore the groups; parameters that the module did not have then get the values with which they were added.

        What was added since is taken out of the groups, and put back by `put_back` unless the code that added it does
        so again; what was removed since comes back. Without ``rewind`` the groups stay as they are.

        Args:
            groups: from `capture`.
            now: applied steps before the run goes back.
            rewind: whether the run comes again to where it was.
        """
        for p, value in self._first.items():
            if p not in groups.trained:
                p.copy_(value)
        if not rewind:
            return
        before = {p for _, parameters in groups.groups[0] for p in parameters}
        for group in self._optimizer.param_groups:
            if late := [p for p in group["params"] if p not in before]:
                self._late.append(_Late(group, late, self._added.get(late[0], now)))
        for holder, captured in zip(groups.holders, groups.groups, strict=True):
            for group, parameters in captured:
                group["params"][:] = parameters
            holder.param_groups[:] = [group for group, _ in captured]
        for p, trained in groups.trained.items():
            if p.requires_grad and not trained:
                p.grad = None  # it is in no group, so nothing else would clear it
            p.requires_grad_(trained)

    def put_back(self) -> None:
        """Put back what `restore` took out, one step after the one at which it was added; call it before a forward.

        Hooks that add a group at an epoch or a step add it again when the run comes there again; one that remembers
        that it has added it does not.
        """
        if not self._late:
            return
        applied = self._applied()
        groups = self._optimizer.param_groups
        present = {p for group in groups for p in group["params"]}
        waiting = []
        for late in self._late:
            absent = [p for p in late.parameters if p not in present]
            if absent and applied <= late.added:
                waiting.append(late)
            elif absent:
                for p in absent:
                    p.requires_grad_()
                if any(late.group is each for each in groups):
                    late.group["params"] += absent
                else:
                    self._optimizer.add_param_group({**late.group, "params": absent})
        self._late = waiting
