"""Copies of a module's buffers, to undo changes by a forward pass; unchanged buffers are not copied again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from stabletrain.runtime.internals.attributes import names_within

_RUNNING_STATISTICS = ("running_mean", "running_var")


class ModuleBuffers:
    """Copies of a module's buffers, refreshed only for those that may have changed.

    A buffer has changed if it is another tensor than before, or if its version counter has increased (an in-place
    change; changes through ``.data`` are not detected). The kernels of batch and instance normalisation do not increase
    the counter, so running statistics are always treated as changed.

    Args:
        module: the module with the buffers, non-persistent ones included.
        belongs: whether the buffers of a submodule are among them; None: all are.
    """

    def __init__(self, module: nn.Module, belongs: Callable[[nn.Module], bool] | None = None) -> None:
        children = [child for child in module.modules() if belongs is None or belongs(child)]
        owners = [(child, name) for child in children for name in names_within(child._buffers)]
        self.modules: Collection[nn.Module] | None = None if belongs is None else frozenset(children)
        """The submodules; None: all."""
        self._owners = owners
        self._uncounted = [isinstance(child, _NormBase) or name in _RUNNING_STATISTICS for child, name in owners]
        self._tensors = [child._buffers[name] for child, name in owners]
        self._copies = [None if tensor is None else tensor.detach().clone() for tensor in self._tensors]
        self._versions = [_version(tensor) for tensor in self._tensors]

    def stash(self) -> None:
        """Copy the buffers that have changed since the last call."""
        copies: list[Tensor] = []
        tensors: list[Tensor] = []
        for i, tensor in self._changed():
            copy = self._copies[i]
            if tensor is not None and _fits(copy, tensor):
                copies.append(copy)
                tensors.append(tensor)
            else:
                self._copies[i] = None if tensor is None else tensor.detach().clone()
            self._tensors[i], self._versions[i] = tensor, _version(tensor)
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(copies, tensors)

    def restore(self) -> None:
        """Write the copies back into the tensors that the buffers were."""
        for i, _ in self._changed():
            child, name = self._owners[i]
            tensor, copy = self._tensors[i], self._copies[i]
            # inference tensors cannot be changed in place
            if tensor is not None and copy is not None and not tensor.is_inference():
                with torch.no_grad():
                    tensor.copy_(copy)
            child._buffers[name] = tensor
            self._versions[i] = _version(tensor)

    def restore_if_nonfinite(self) -> None:
        """As `restore`, if a NaN or infinity has come into a buffer since it was copied; reads changed buffers."""
        pairs = [(tensor, self._copies[i]) for i, tensor in self._changed()]
        if any(tensor is not None and _fits(copy, tensor) and _spoilt(tensor, copy) for tensor, copy in pairs):
            self.restore()

    def restore_where(self, dropped: Tensor) -> None:
        """As `restore` where ``dropped`` is 1, else as `stash`, decided on the device.

        A buffer that was added, removed or reshaped within the window stays as it is: the host does not know the
        decision yet.
        """
        for i, tensor in self._changed():
            copy = self._copies[i]
            if tensor is not None and _fits(copy, tensor):
                with torch.no_grad():
                    tensor.copy_(torch.where(dropped.bool(), copy, tensor))
                    copy.copy_(tensor)
            else:
                self._copies[i] = None if tensor is None else tensor.detach().clone()
            self._tensors[i], self._versions[i] = tensor, _version(tensor)

    def _changed(self) -> list[tuple[int, Tensor | None]]:
        found = []
        for i, (child, name) in enumerate(self._owners):
            own = child._buffers
            tensor = own[name] if name in own else None  # noqa: SIM401 - a scripted module's has no get
            known, uncounted = tensor is self._tensors[i], self._uncounted[i] and tensor is not None
            if not known or uncounted or _version(tensor) != self._versions[i]:
                found.append((i, tensor))
        return found


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _fits(copy: Tensor | None, tensor: Tensor) -> TypeGuard[Tensor]:
    return copy is not None and copy.shape == tensor.shape and copy.dtype == tensor.dtype


def _spoilt(tensor: Tensor, copy: Tensor) -> bool:
    return bool((copy.isfinite() & ~tensor.isfinite()).any())
