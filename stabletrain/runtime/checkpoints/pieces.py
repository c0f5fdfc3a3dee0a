"""The files of a checkpoint that several processes have written: which blocks of which tensors each holds.

In the state file, ``files`` has for each file the list ``[[index of the tensor, offset, shape], ...]`` in the order in
which the blocks were written. In the file itself a block is called ``NAME@OFFSET``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stabletrain.runtime.checkpoints import tensor_file
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.fields import INT_LIMIT
from stabletrain.runtime.checkpoints.manifest import TENSORS, Manifest
from stabletrain.runtime.checkpoints.regions import Box, Region, boxes, overlap, sizes, view, whole
from stabletrain.runtime.checkpoints.tensor_file import Kind


class Piece(NamedTuple):
    """A block of a tensor in a file.

    Args:
        name: of the tensor.
        box: the block of the whole tensor.
    """

    name: str
    box: Box

    @property
    def entry(self) -> str:
        """Its name in the file.

        >>> Piece("state_dict.net.0.weight", Box((2, 0), (2, 3))).entry
        'state_dict.net.0.weight@2,0'
        """
        return f"{self.name}@{','.join(map(str, self.box.offset))}"


def index_of(files: Mapping[str, Sequence[Piece]], names: Sequence[str]) -> dict[str, Any]:
    """The entry ``files`` of the state file.

    Args:
        files: the blocks in each file.
        names: of all tensors of the checkpoint.

    Raises:
        CheckpointError: if there is a block of another tensor: the processes train different models.
    """
    numbers = {name: i for i, name in enumerate(names)}
    unknown = [piece.name for pieces in files.values() for piece in pieces if piece.name not in numbers]
    if unknown:
        raise CheckpointError(f"checkpoint: rank 0 has no {unknown[0]}, which another rank has written")
    return {
        file: [[numbers[name], list(box.offset), list(box.shape)] for name, box in pieces]
        for file, pieces in files.items()
    }


def files_of(index: Any, kinds: Sequence[Kind], manifest: Manifest) -> dict[str, list[tuple[int, Box]]]:
    """For each file of tensors the blocks that it holds, each with the number of its tensor.

    Args:
        index: the entry ``files`` of a state file; not read for a checkpoint that one process has written.
        kinds: of all tensors.
        manifest: of the checkpoint.

    Raises:
        CheckpointError: if it is anything else than what `index_of` returns, or a block is not within its tensor.
    """
    if not manifest.is_divided:
        return {TENSORS: [(i, Box((0,) * len(kind.shape), kind.shape)) for i, kind in enumerate(kinds)]}
    names = [name for name in manifest.files if name.startswith("tensors-")]
    if not isinstance(index, dict) or set(index) != set(names):
        raise CheckpointError("checkpoint: the list of its files is not that of the manifest")
    return {name: [_block(entry, kinds) for entry in _list(index[name])] for name in names}


def read(
    folder: Path,
    manifest: Manifest,
    kinds: Sequence[Kind],
    files: Mapping[str, Sequence[tuple[int, Box]]],
    wanted: Mapping[int, Region],
) -> list[Tensor]:
    """Read tensors, or the wanted parts of them. Only files that hold some of it are opened, and verified wholly.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        kinds: of all tensors.
        files: from `files_of`.
        wanted: number of a tensor -> the part to read, within its shape; the others are read whole. If it is empty,
            all files are verified.

    Returns:
        All tensors, on the CPU.

    Raises:
        CheckpointError: if a file is damaged, or the files do not hold all of a tensor.
    """
    regions = [wanted.get(i) or whole(kind.shape) for i, kind in enumerate(kinds)]
    targets = [boxes(region) for region in regions]
    found: dict[int, Tensor] = {}
    left = [math.prod(sizes(region)) for region in regions]
    for name, blocks in files.items():
        needed = [
            [(mine, at, part) for mine, at in targets[i] if (part := overlap(mine, box)) is not None]
            for i, box in blocks
        ]
        if wanted and not any(needed):
            continue
        kinds_in_file = [
            Kind(Piece(kinds[i].name, box).entry if manifest.is_divided else kinds[i].name, kinds[i].dtype, box.shape)
            for i, box in blocks
        ]
        try:
            here = tensor_file.read(
                folder / name, manifest.files[name], kinds_in_file, {k for k, each in enumerate(needed) if each}
            )
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror})") from None
        for k, (i, box) in enumerate(blocks):
            for mine, at, part in needed[k]:
                left[i] -= part.numel
                if i not in found and here[k].shape == sizes(regions[i]) and part.numel == box.numel:
                    found[i] = here[k]  # all that is wanted: not copied
                    continue
                if i not in found:
                    found[i] = torch.empty(sizes(regions[i]), dtype=kinds[i].dtype)
                origin = [a - b for a, b in zip(mine.offset, at.offset, strict=True)]
                view(found[i], origin, part).copy_(view(here[k], box.offset, part))
    for i, kind in enumerate(kinds):
        if left[i]:
            raise CheckpointError(f"checkpoint: its files hold too few or too many elements of {kind.name!r}")
        if i not in found:
            found[i] = torch.empty(sizes(regions[i]), dtype=kind.dtype)
    return [found[i] for i in range(len(kinds))]


def blocks_of(name: str, region: Region, local: Tensor) -> Iterable[tuple[Piece, Tensor]]:
    """The blocks of a part, each with its elements, which are not copied.

    Args:
        name: of the tensor.
        region: the elements that ``local`` holds.
        local: of the region's size.
    """
    for box, at in boxes(region):
        yield Piece(name, box), view(local, (0,) * local.dim(), at)


def _block(entry: Any, kinds: Sequence[Kind]) -> tuple[int, Box]:
    if not (isinstance(entry, list) and len(entry) == 3 and type(entry[0]) is int and 0 <= entry[0] < len(kinds)):
        raise CheckpointError("checkpoint: an entry of the list of a file's blocks is damaged")
    number, offset, shape = entry
    total = kinds[number].shape
    for each in (offset, shape):
        if not (isinstance(each, list) and len(each) == len(total)) or not all(
            type(n) is int and 0 <= n < INT_LIMIT for n in each
        ):
            raise CheckpointError(f"checkpoint: a block of {kinds[number].name!r} is damaged")
    if any(a + n > size for a, n, size in zip(offset, shape, total, strict=True)):
        raise CheckpointError(f"checkpoint: a block of {kinds[number].name!r} is not within the tensor")
    return number, Box(tuple(offset), tuple(shape))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise CheckpointError("checkpoint: the list of a file's blocks is damaged")
    return value
