"""What one process writes of a copy in memory: its own parts, and for rank 0 also what only rank 0 knows.

A copy is complete in itself: whoever reads it needs no file of another process. So each process writes all that it
holds, also what others hold too, and everything that is neither of the model nor of an optimizer comes from rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from stabletrain.runtime.checkpoints.collecting import parts_of
from stabletrain.runtime.checkpoints.encoding import Encoded
from stabletrain.runtime.checkpoints.names import plain_name
from stabletrain.runtime.checkpoints.pieces import Piece, blocks_of
from stabletrain.runtime.checkpoints.regions import whole
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.ranks import Ranks

_OPTIMIZERS = "optimizer_states."


class Contents:
    """The tensors that one process copies.

    Args:
        encoded: the checkpoint, on rank 0; else None.
    """

    def __init__(self, encoded: Encoded | None) -> None:
        self.encoded = encoded
        self.omitted = [] if encoded is None else encoded.omitted
        self.tensors: list[Tensor] = []
        self.pieces: list[Piece] = []
        self.common = 0
        """How many of the tensors, the first ones, all processes need; on rank 0."""

    def add(self, name: str, region: Any, local: Tensor) -> None:
        """Add the elements that this process holds of a tensor."""
        for piece, tensor in blocks_of(name, region, local):
            self.pieces.append(piece)
            self.tensors.append(tensor)

    def add_common(self, name: str, tensor: Tensor) -> None:
        """Add a tensor of rank 0's that all processes need; before all others."""
        self.add(name, whole(tensor.shape), tensor)
        self.common = len(self.pieces)


def of_divided(checkpoint: Mapping[str, Any], is_first: bool) -> Contents:
    """What a process writes of a model that is divided.

    Args:
        checkpoint: from `collected`.
        is_first: whether this is rank 0.

    Raises:
        CheckpointError: on rank 0, if the checkpoint holds something that cannot be stored as data.
    """
    contents = Contents(Encoded(checkpoint) if is_first else None)
    if contents.encoded is not None:
        encoded = contents.encoded
        for i, (name, tensor) in enumerate(zip(encoded.names, encoded.tensors, strict=True)):
            if encoded.parts.get(name) != i:
                contents.add_common(name, tensor)
    for part in parts_of([checkpoint["state_dict"], checkpoint.get("optimizer_states")]):
        if part.local is not None:
            contents.add(part.name, part.region, part.local)
    return contents


def of_replicated(checkpoint: Mapping[str, Any], trainer: Trainer, is_first: bool, leads: bool) -> Contents:
    """What a process writes of a model that every process has whole: the first process of each node all of it.

    Args:
        checkpoint: from `collected`.
        trainer: in a fit.
        is_first: whether this is rank 0.
        leads: whether this process is the first of its node.

    Raises:
        CheckpointError: if the checkpoint holds something that cannot be stored as data.
    """
    if not leads and not is_first:
        return Contents(None)
    encoded = Encoded(checkpoint)
    contents = Contents(encoded if is_first else None)
    equal = _equal_on_all(trainer)
    pairs = list(zip(encoded.names, encoded.tensors, strict=True))
    own = [(name, each) for name, each in pairs if name in equal or (equal and name.startswith(_OPTIMIZERS))]
    taken = {name for name, _ in own}
    for name, tensor in pairs if is_first else ():
        if name not in taken:
            contents.add_common(name, tensor)
    for name, tensor in own:
        contents.add(name, whole(tensor.shape), tensor)
    return contents


def _equal_on_all(trainer: Trainer) -> set[str]:
    """The names in a checkpoint of the parameters whose copies are kept equal; none if that is not true of all.

    Buffers are not among them: before each forward pass the others get those of rank 0.
    """
    module, ranks = trainer_internals.unwrapped(trainer.lightning_module), Ranks(trainer)
    named = list(module.named_parameters(remove_duplicate=False))
    if any(ranks.placement(p) != "replicated" for _, p in named):
        return set()
    return {f"state_dict.{name}" for key, _ in named for name in (key, plain_name(key))}


def nbytes_of(contents: Contents) -> int:
    """Size of what a process writes, without what comes from rank 0, bytes."""
    return sum(each.numel() * each.element_size() for each in contents.tensors)


def on_host(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors on the CPU, as they are sent."""
    return [each.detach().to("cpu", memory_format=torch.contiguous_format) for each in tensors]
