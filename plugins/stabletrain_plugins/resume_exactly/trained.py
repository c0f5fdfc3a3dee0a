"""What is trained, where training has changed it: layers frozen or unfrozen, and parameters added to an optimizer.

No ``state_dict`` holds it, and ``BackboneFinetuning``, for one, freezes its layers again in every fit that resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

_NORM = nn.modules.batchnorm._NormBase
_Groups: TypeAlias = list[list[list[str]]]
_NOTHING: dict[str, Any] = {"flags": {}, "groups": []}


class Trained:
    """Saves and restores which parameters are trained, and which normalisation layers gather statistics.

    Only what has changed since the fit started: what the module itself freezes may differ in the resumed run.

    Args:
        module: that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._optimizers: Sequence[Optimizer] = ()
        self._flags: dict[str, bool] = {}
        self._groups: _Groups = []
        self._loaded = _NOTHING
        self._has_begun = False

    def load(self, state: dict[str, Any]) -> None:
        """Restore this when the fit starts.

        Args:
            state: from `state`.
        """
        self._loaded = state

    def on_fit_start(self, optimizers: Sequence[Optimizer]) -> None:
        """Add the parameters that the optimizers had at the checkpoint; before the optimizers' states are loaded.

        Groups that cannot be built from those that are there are left as they are.

        Args:
            optimizers: of the fit.
        """
        self._optimizers = optimizers
        self._flags, self._groups = self._flags_now(), self._groups_now()
        named: dict[str, Tensor] = dict(self._module.named_parameters())
        for optimizer, groups in zip(optimizers, self._loaded["groups"], strict=False):
            is_known = all(name in named for names in groups for name in names)
            if is_known and len(groups) >= len(optimizer.param_groups):
                _add(optimizer, [[named[name] for name in names] for names in groups])

    def on_loop_start(self) -> None:
        """Restore the layers; call it after ``on_train_start`` of all callbacks and of the module."""
        flags = self._loaded["flags"]
        for name, parameter in self._module.named_parameters():
            if name in flags and (parameter.is_floating_point() or parameter.is_complex()):
                parameter.requires_grad_(flags[name])
        for path, layer in self._module.named_modules():
            if isinstance(layer, _NORM):
                layer.track_running_stats = flags.get(_key(path), layer.track_running_stats)
        self._has_begun = True

    def state(self) -> dict[str, Any]:
        """What has changed: flags by name, and the names of the parameters in each optimizer's groups."""
        if not self._has_begun:
            return self._loaded
        flags = {name: flag for name, flag in self._flags_now().items() if self._flags.get(name) is not flag}
        groups = self._groups_now()
        return {"flags": flags, "groups": groups if groups != self._groups else []}

    def _flags_now(self) -> dict[str, bool]:
        flags = {name: each.requires_grad for name, each in self._module.named_parameters()}
        for path, layer in self._module.named_modules():
            if isinstance(layer, _NORM):
                flags[_key(path)] = layer.track_running_stats
        return flags

    def _groups_now(self) -> _Groups:
        names = {p: name for name, p in self._module.named_parameters()}
        return [
            [[names.get(p, "") for p in group["params"]] for group in each.param_groups] for each in self._optimizers
        ]


def checked(state: Any) -> dict[str, Any]:
    """A state of `Trained`, read from a checkpoint of any content.

    Raises:
        KeyError, TypeError: if it is something else.
    """
    flags, groups = state["flags"], state["groups"]
    known = isinstance(flags, dict) and all(type(k) is str and type(v) is bool for k, v in flags.items())
    lists = isinstance(groups, list) and all(type(n) is str for each in groups for names in each for n in names)
    if not (known and lists):
        raise TypeError("expected names of parameters and whether they are trained")
    return {"flags": flags, "groups": groups}


def _add(optimizer: Optimizer, groups: list[list[Tensor]]) -> None:
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for i, parameters in enumerate(groups):
        late = [each for each in parameters if id(each) not in present]
        if late and i < len(optimizer.param_groups):
            optimizer.param_groups[i]["params"].extend(late)
        elif late:
            optimizer.add_param_group({"params": late})


def _key(path: str) -> str:
    return f"{path}.track_running_stats" if path else "track_running_stats"
