"""The values with which a module starts: allocated where they were left out, and those of rank 0 on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from stabletrain.errors import UserError
from stabletrain.runtime.internals.sharding import broadcast_coalesced
from stabletrain.runtime.internals.shards import class_name


class InitialValues:
    """Allocates what is on the meta device, and broadcasts rank 0's values, unit by unit: one is whole at a time.

    Args:
        root: the LightningModule, before it is sharded.
        device: that of the training.
        home: where parameters are kept between uses; the CPU with offloading.
    """

    def __init__(self, root: nn.Module, device: torch.device, home: torch.device) -> None:
        self._device, self._home = device, home
        self._done: set[int] = set()
        self._made: dict[int, nn.Parameter] = {}
        self._placeholders: list[nn.Parameter] = []  # kept, so that no other parameter gets one of their ids
        self._names = {id(each): name for name, each in root.named_modules()}

    def complete(self, part: nn.Module) -> None:
        """Give a part of the module, without what is complete already, the values of rank 0. A collective.

        Args:
            part: a unit, or the root after its units.

        Raises:
            UserError: if a module on the meta device has no ``reset_parameters``.
        """
        modules = [each for each in part.modules() if id(each) not in self._done]
        self._done |= {id(each) for each in modules}
        resets = [self._allocate(each) for each in modules if any(tensor.is_meta for tensor in _own(each))]
        for reset in reversed(resets):  # inner modules first: an outer one may change what they did
            reset()
        tensors = {id(t): t.detach() for module in modules for t in _own(module)}
        self._broadcast(list(tensors.values()))

    def _allocate(self, module: nn.Module) -> Callable[[], object]:
        """Give a module memory; returns the method that gives it values."""
        # torch's own attention and Transformer have it under a private name
        found = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
        reset: Callable[[], object] | None = next((each for each in found if callable(each)), None)
        if reset is None:
            raise UserError(
                f"fsdp2: {self._names[id(module)] or class_name(module)} ({class_name(module)}) was made on the meta "
                "device and has no reset_parameters(), which would give its parameters and buffers their first values. "
                "Write that method, or make the module on the CPU"
            )
        for key, p in list(module._parameters.items()):
            if p is not None and p.is_meta:  # a tied one is made once
                fresh = self._made.get(id(p))
                if fresh is None:
                    data = torch.empty_like(p, device=self._home)
                    fresh = self._made[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad)
                    self._placeholders.append(p)
                module._parameters[key] = fresh
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device=self._device)
        return reset

    def _broadcast(self, tensors: list[Tensor]) -> None:
        here = [t for t in tensors if t.numel() and t.device == self._device]
        broadcast_coalesced(here)
        for t in tensors:
            if t.numel() and t.device != self._device:  # one by one: a copy of each is made on the device
                copy = t.to(self._device)
                broadcast_coalesced([copy])
                t.copy_(copy)


def _own(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers that are registered in a module itself."""
    found: Iterable[Tensor | None] = (*module._parameters.values(), *module._buffers.values())
    return (each for each in found if each is not None)
