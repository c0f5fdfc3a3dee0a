"""Layers that are frozen or unfrozen during training, as by ``BackboneFinetuning``, which no state_dict holds."""

from __future__ import annotations

from torch import nn

_NORM = nn.modules.batchnorm._NormBase


class FrozenLayers:
    """Saves and restores which parameters are trained, and which normalisation layers gather statistics.

    Only what has changed since training started: what the module itself freezes may differ in the resumed run.

    Args:
        module: that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._at_start: dict[str, bool] | None = None
        self._loaded: dict[str, bool] = {}

    def load(self, changed: dict[str, bool]) -> None:
        """Restore this when training starts."""
        self._loaded = dict(changed)

    def on_loop_start(self) -> None:
        """Restore what was loaded; call it after ``on_train_start`` of all callbacks and of the module."""
        self._at_start = self._flags()
        for name, parameter in self._module.named_parameters():
            if name in self._loaded and (parameter.is_floating_point() or parameter.is_complex()):
                parameter.requires_grad_(self._loaded[name])
        for path, layer in self._module.named_modules():
            if isinstance(layer, _NORM):
                layer.track_running_stats = self._loaded.get(_key(path), layer.track_running_stats)
        self._loaded = {}

    def state(self) -> dict[str, bool]:
        """What has changed since training started, by name."""
        if self._at_start is None:
            return self._loaded
        return {name: flag for name, flag in self._flags().items() if self._at_start.get(name, flag) is not flag}

    def _flags(self) -> dict[str, bool]:
        flags = {name: each.requires_grad for name, each in self._module.named_parameters()}
        for path, layer in self._module.named_modules():
            if isinstance(layer, _NORM):
                flags[_key(path)] = layer.track_running_stats
        return flags


def checked(changed: dict[str, bool]) -> dict[str, bool]:
    """A state of `FrozenLayers`, read from a checkpoint of any content. Raises TypeError for anything else."""
    if not all(type(name) is str and type(flag) is bool for name, flag in changed.items()):
        raise TypeError("expected names of parameters and whether they are trained")
    return dict(changed)


def _key(path: str) -> str:
    return f"{path}.track_running_stats" if path else "track_running_stats"
