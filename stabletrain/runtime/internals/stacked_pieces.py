"""Parts of stacked matrices in torch's sharded checkpoints (torch.distributed.checkpoint, DCP).

DCP takes what a rank has of a DTensor for one block of the whole tensor. A rank has several blocks of a tensor that is
placed by `stacked_shard`: DCP would write them to wrong rows without an error. `StackedPieces` stands for such a
tensor in a state dict, and tells DCP each of its blocks. Shape and order in the checkpoint are those of the whole
tensor, so that it can be read by any number of ranks, and by those that cut it otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stabletrain.runtime.internals.model_parallel import stacked_in


class StackedPieces(Tensor):
    """This rank's part of a stacked tensor, for DCP; shares its memory.

    Make it with `for_checkpoint`.
    """

    whole: torch.Size
    pieces: dict[torch.Size, Tensor]
    """By offset in the whole tensor, the blocks that this rank has."""

    def size(self, dim: int | None = None) -> Any:
        """The shape of the whole tensor, with which DCP compares that in the checkpoint."""
        return self.whole if dim is None else self.whole[dim]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.pieces[chunk.offsets]),
                    size=self.whole,
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, piece.size()) for offsets, piece in self.pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.offset]


def pieces_of(tensor: DTensor) -> dict[torch.Size, Tensor] | None:
    """The blocks that this rank has of a stacked tensor, views of its memory, by their offset in the whole tensor.

    Args:
        tensor: stacked along its first dimension on one dimension of its mesh; on others it may be cut along further
            dimensions.

    Returns:
        None for a tensor that is not stacked, and one of which this rank has a single block: where FSDP2 cuts the part
        of a rank of a tensor-parallel group again.
    """
    ours = [each for each in enumerate(tensor.placements) if (stacked_in(each[1]) or 1) > 1]
    if len(ours) != 1:
        return None
    mesh_dim, placement = ours[0]
    others = [p for i, p in enumerate(tensor.placements) if i != mesh_dim]
    if any(getattr(p, "dim", None) == placement.dim for p in others):  # type: ignore[attr-defined]
        return None
    stacked, ranks = stacked_in(placement) or 1, tensor.device_mesh.size(mesh_dim)
    rest = [Replicate() if i == mesh_dim else p for i, p in enumerate(tensor.placements)]
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, rest)
    local = tensor.to_local().detach()
    height, rank = tensor.shape[0] // stacked, tensor.device_mesh.get_local_rank(mesh_dim)
    return {
        torch.Size([i * height + rank * (height // ranks), *offsets[1:]]): piece
        for i, piece in enumerate(local.chunk(stacked))
    }


def for_checkpoint(value: Any) -> Any:
    """A state dict of any depth, with each stacked tensor as `StackedPieces`, which shares its memory."""
    if isinstance(value, dict):
        return {key: for_checkpoint(each) for key, each in value.items()}
    if isinstance(value, list):
        return [for_checkpoint(each) for each in value]
    pieces = pieces_of(value) if isinstance(value, DTensor) else None
    if pieces is None:
        return value
    made = value.to_local().detach().as_subclass(StackedPieces)
    made.whole, made.pieces = value.shape, pieces
    return made
