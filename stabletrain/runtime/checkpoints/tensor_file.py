"""Tensors in one file of the safetensors format, written and read as a stream: the checksum costs no extra pass.

The safetensors package is not needed; every tool that reads this format can read the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import xxhash
from torch import Tensor

from stabletrain.runtime.checkpoints.durable import FileRecord
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.regular_file import open_regular

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SURELY_AVAILABLE = 64 << 20
"""Tensors of fewer bytes in total are read without a look at the free memory."""


class Kind(NamedTuple):
    """Name, dtype and shape of a tensor.

    Args:
        name: distinct in its file.
        dtype: any but the quantized ones.
        shape: sizes >= 0.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its elements, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def chunks(names: Sequence[str], tensors: Sequence[Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the content of a file, piece by piece.

    Args:
        names: of the tensors, all distinct.
        tensors: plain dense tensors, on any device and of any stride.
    """
    kinds = [Kind(name, each.dtype, tuple(each.shape)) for name, each in zip(names, tensors, strict=True)]
    yield _header(kinds)
    for i in _order(kinds):
        if tensors[i].numel():
            yield _bytes(tensors[i].detach().cpu().contiguous())


def read(path: Path, record: FileRecord, kinds: Sequence[Kind], wanted: Set[int] | None = None) -> dict[int, Tensor]:
    """Read a file and verify it in the same pass; every tensor gets its own memory.

    The header must be, byte for byte, the one that `chunks` writes for these tensors: names, dtypes, shapes and offsets
    are not believed twice. No memory is taken before the sizes agree.

    Args:
        path: the file.
        record: its size and checksum.
        kinds: of its tensors, in the order in which they were written.
        wanted: the positions in ``kinds`` of the tensors to return; None: all. The others take no memory.

    Returns:
        Its tensors by their position in ``kinds``.

    Raises:
        CheckpointError: if size, checksum or header differ from what was written, or the memory does not suffice.
        OSError: if it cannot be read.
    """
    header = _header(kinds)
    nbytes = sum(kind.nbytes for kind in kinds)
    if len(header) + nbytes != record.bytes:
        raise CheckpointError(f"{path.name} has a damaged header: its tensors need {len(header) + nbytes} bytes")
    _require_memory(path.name, sum(k.nbytes for i, k in enumerate(kinds) if wanted is None or i in wanted))
    digest = xxhash.xxh3_128()
    with open_regular(path) as file:

        def take(target: memoryview) -> None:
            done = 0
            while done < len(target):
                count = file.readinto(target[done : done + (16 << 20)])
                if not count:
                    raise CheckpointError(f"{path.name} is shorter than expected")
                digest.update(target[done : done + count])
                done += count

        def skip(nbytes: int) -> None:
            scratch = memoryview(bytearray(min(nbytes, 16 << 20)))
            for start in range(0, nbytes, len(scratch) or 1):
                take(scratch[: nbytes - start])

        found_header = bytearray(len(header))
        take(memoryview(found_header))
        if found_header != header:
            raise CheckpointError(f"{path.name} has a damaged header")
        found: dict[int, Tensor] = {}
        for i in _order(kinds):
            if wanted is not None and i not in wanted:
                skip(kinds[i].nbytes)
                continue
            try:
                found[i] = torch.empty(kinds[i].shape, dtype=kinds[i].dtype)
            except RuntimeError as error:  # too many elements for torch, or too many bytes for the machine
                raise CheckpointError(f"{path.name}: no memory for {kinds[i].name!r} ({_first_line(error)})") from None
            if kinds[i].nbytes:
                take(_bytes(found[i]))
        if file.read(1):
            raise CheckpointError(f"{path.name} is longer than expected")
    if digest.hexdigest() != record.xxh3_128:
        raise CheckpointError(f"{path.name} does not match its checksum")
    return found


def _header(kinds: Sequence[Kind]) -> bytes:
    """The beginning of a file: the length of the JSON header, and the header, padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {}
    offset = 0
    for i in _order(kinds):
        kind = kinds[i]
        known = _NAMES.get(kind.dtype)
        shape = list(kind.shape) if known else [kind.nbytes]
        entries[kind.name] = {
            "dtype": known or "U8",
            "shape": shape,
            "data_offsets": [offset, offset + kind.nbytes],
        }
        offset += kind.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(kinds: Sequence[Kind]) -> list[int]:
    """The order in the file: the widest first, so that every tensor is aligned without gaps."""
    return sorted(range(len(kinds)), key=lambda i: -kinds[i].dtype.itemsize)


def _require_memory(name: str, nbytes: int) -> None:
    """A sparse file of any size costs its author nothing; without this the system would end the process."""
    if nbytes < _SURELY_AVAILABLE:
        return
    available = psutil.virtual_memory().available + psutil.swap_memory().free
    if nbytes > available:
        raise CheckpointError(
            f"{name} holds tensors of {nbytes / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are free"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip()


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
