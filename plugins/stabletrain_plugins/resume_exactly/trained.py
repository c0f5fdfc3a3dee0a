"""Which parameters are trained, where training has changed it: unfrozen ones, and those added to an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

_Groups: TypeAlias = list[list[list[str]]]


class Trained:
    """The parameters that are trained at the beginning of a fit, to find what has changed since.

    Args:
        module: of the fit.
        optimizers: its optimizers.
    """

    def __init__(self, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        self._module, self._optimizers = module, optimizers
        self._flags = {name: p.requires_grad for name, p in module.named_parameters()}
        self._groups = self._group_names()

    def state(self) -> dict[str, Any]:
        """What has changed: ``requires_grad`` by name, and the names of the parameters in each optimizer's groups."""
        flags = {name: p.requires_grad for name, p in self._module.named_parameters()}
        changed = {name: flag for name, flag in flags.items() if self._flags.get(name) is not flag}
        groups = self._group_names()
        return {"requires_grad": changed, "groups": groups if groups != self._groups else []}

    def restore_groups(self, state: Mapping[str, Any]) -> None:
        """Add the parameters that the optimizers had at the checkpoint; before the optimizers' states are loaded.

        Args:
            state: from `state`; one whose groups cannot be built from those that are there changes nothing.
        """
        named: dict[str, Tensor] = dict(self._module.named_parameters())
        for optimizer, groups in zip(self._optimizers, state["groups"], strict=False):
            present = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(name not in named for names in groups for name in names) or len(groups) < len(
                optimizer.param_groups
            ):
                continue
            for i, names in enumerate(groups):
                late = [named[name] for name in names if id(named[name]) not in present]
                if not late:
                    continue
                if i < len(optimizer.param_groups):
                    optimizer.param_groups[i]["params"].extend(late)
                else:
                    optimizer.add_param_group({"params": late})

    def restore_flags(self, state: Mapping[str, Any]) -> None:
        """Set ``requires_grad`` as it was at the checkpoint.

        Args:
            state: from `state`.
        """
        named = dict(self._module.named_parameters())
        for name, flag in state["requires_grad"].items():
            if name in named:
                named[name].requires_grad_(flag)

    def _group_names(self) -> _Groups:
        names = {p: name for name, p in self._module.named_parameters()}
        return [
            [[names.get(p, "") for p in group["params"]] for group in each.param_groups] for each in self._optimizers
        ]


def check(state: Any) -> dict[str, Any]:
    """A state from a checkpoint.

    Raises:
        TypeError: if it is something else.
    """
    flags, groups = state["requires_grad"], state["groups"]
    known = isinstance(flags, dict) and all(type(k) is str and type(v) is bool for k, v in flags.items())
    lists = isinstance(groups, list) and all(type(n) is str for each in groups for names in each for n in names)
    if not (known and lists):
        raise TypeError("expected the names of the trained parameters")
    return {"requires_grad": flags, "groups": groups}
