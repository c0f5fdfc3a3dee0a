"""What is read inside a module in its first steps: units, sizes of outputs, modes; closed before the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_GATES = (nn.ReLU, nn.GELU, nn.SiLU)
_SIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LSTM, nn.GRU, nn.RNN)
_RELU = (F.relu, torch.relu, torch.Tensor.relu)
_ALIVE = 0.0
"""A unit is active where its output is above this."""


class FirstSteps:
    """Reads a module's outputs in a few steps. `open` before each of them, `close` before its backward pass."""

    def __init__(self) -> None:
        self.active: dict[str, Tensor] = {}
        """For each activation function, by its module's name or ``relu 1``: the largest share of values above zero
        of each unit, in one batch."""
        self.rms: dict[str, float] = {}
        """Root mean square of the first output of each layer."""
        self.in_eval: dict[str, None] = {}
        """Names of normalisations and dropouts that are in eval mode."""
        self.per_channel: dict[str, int] = {}
        """Values per channel of which a normalisation takes its statistics, the fewest."""
        self._handles: list[Any] = []
        self._relu: tuple[str, Any] | None = None
        self._mode: _SeeRelu | None = None

    def open(self, module: LightningModule) -> None:
        """Begin to read.

        Args:
            module: in training.
        """
        for name, each in module.named_modules():
            if not each.training and isinstance(each, (*NORMS, *DROPOUTS)) and not _is_frozen(each):
                self.in_eval[name] = None
            if isinstance(each, _GATES):
                self._hook(each, name, self._units)
            if isinstance(each, _SIZED):
                self._hook(each, name, self._size)
            if isinstance(each, NORMS) and each.training:
                self._hook(each, name, self._values)
        self._mode = _SeeRelu(self._function)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """End reading; a second call does nothing."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None
        self._count_function()
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, module: nn.Module, name: str, read: Callable[[str, Any, Any], None]) -> None:
        def hook(_: nn.Module, given: Any, output: Any) -> None:
            read(name, given, output)

        self._handles.append(module.register_forward_hook(hook))

    def _function(self, name: str, output: Any) -> None:
        self._count_function()
        self._relu = (name, output)

    def _count_function(self) -> None:
        """Count the last call of a function, unless a module made it, which has been counted by its name."""
        if (last := self._relu) is not None:
            self._relu = None
            self._units(last[0], None, last[1])

    def _units(self, name: str, given: Any, output: Any) -> None:
        if self._relu is not None and self._relu[1] is output:
            self._relu = None
        value = output.detach()
        if value.ndim < 2:
            return
        channel = 1 if value.ndim >= 4 else value.ndim - 1
        active = (value > _ALIVE).float().mean([dim for dim in range(value.ndim) if dim != channel])
        known = self.active.get(name)
        if known is None or known.shape != active.shape:
            self.active[name] = active
        else:
            self.active[name] = torch.maximum(known, active)

    def _size(self, name: str, given: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if name not in self.rms and isinstance(first, Tensor) and first.numel():
            self.rms[name] = float(first.detach().float().square().mean().sqrt())

    def _values(self, name: str, given: Any, output: Any) -> None:
        count = given[0].numel() // given[0].shape[1]
        self.per_channel[name] = min(count, self.per_channel.get(name, count))


class _SeeRelu(TorchFunctionMode):
    """Sees ``F.relu(x)`` and ``x.relu()``, also of `nn.ReLU`."""

    def __init__(self, seen: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._seen = seen
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _RELU:
            self._count += 1
            self._seen(f"relu {self._count}", result)
        return result


def _is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, none of which is trained: eval mode is then meant."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(each.requires_grad for each in own)
