"""Random numbers under tensor parallelism: the same ones where tensors are whole, others where they are cut.

All ranks of a group have the same generators, so that dropout of a whole tensor is the same on all of them. Between
the column-wise layers and the row-wise layer of a region each rank has other elements, and would draw the same mask
for them: there the generator is seeded from its common state and the rank. Nothing has to be saved for a resume, and
a run without random numbers in these regions draws what a single process draws.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.strategies.tensor_parallel_plan import Assignment


def add_regions(module: nn.Module, assigned: Assignment, rank: int) -> None:
    """Give each region of cut layers its own random numbers while it trains.

    A region consists of the column-wise layers and the row-wise layers with the same nearest common ancestor.

    Args:
        module: whose layers have been cut.
        assigned: says which.
        rank: of this process within its group.
    """
    regions: dict[str, Region] = {}
    for names, others in ((list(assigned.colwise), assigned.rowwise), (assigned.rowwise, list(assigned.colwise))):
        for name in names:
            owner = _ancestor(name, others)
            region = regions.setdefault(owner, Region(rank))
            layer = module.get_submodule(name)
            if names is assigned.rowwise:
                layer.register_forward_pre_hook(region.leave, prepend=True)
            else:
                layer.register_forward_hook(region.enter)


def _ancestor(name: str, others: list[str]) -> str:
    """The nearest module around a layer that also contains one of the others."""
    while name:
        name = name.rpartition(".")[0]
        if not name or any(other.startswith(f"{name}.") for other in others):
            break
    return name


class Region:
    """Switches the generator where tensors become cut, and back where they are whole again."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._common: Tensor | None = None
        self._seeded: Tensor | None = None
        self._entered: set[nn.Module] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return Region(self._rank)

    def enter(self, layer: nn.Module, _: Any, output: Tensor) -> None:
        """A column-wise layer has been computed; the first one of the region switches."""
        if not layer.training or not self._is_first(layer):
            return
        generator = _generator(output.device)
        self._common = generator.get_state()
        state = self._common.numpy().tobytes()
        seed = hashlib.blake2b(state, digest_size=8, salt=self._rank.to_bytes(8, "little")).digest()
        generator.manual_seed(int.from_bytes(seed, "little") >> 1)
        self._seeded = generator.get_state()

    def _is_first(self, layer: nn.Module) -> bool:
        # a layer that comes twice: the region was never left, because its computation was interrupted
        if self._common is not None and layer not in self._entered:
            self._entered.add(layer)
            return False
        self._entered = {layer}
        return True

    def leave(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before the row-wise layer: back to the common state, which advances if numbers were drawn."""
        if not layer.training or self._common is None or self._seeded is None:
            return
        generator = _generator(inputs[0].device)
        drawn = not torch.equal(generator.get_state(), self._seeded)
        generator.set_state(self._common)
        if drawn:
            torch.empty(1, device=inputs[0].device).uniform_(generator=generator)
        self._common = self._seeded = None
        self._entered.clear()


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
