"""Tensors in one file of the safetensors format, written and read as a stream: the checksum costs no extra pass.

The safetensors package is not needed; every tool that reads this format can read the files.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from stabletrain.runtime.checkpoints.durable import FileRecord
from stabletrain.runtime.checkpoints.manifest import CheckpointError

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
_HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors package


def chunks(names: Sequence[str], tensors: Sequence[Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the content of a file, piece by piece.

    Args:
        names: of the tensors, all distinct.
        tensors: plain dense tensors, on any device and of any stride.
    """
    # the widest first, so that every tensor is aligned without gaps
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    header: dict[str, Any] = {}
    offset = 0
    for i in order:
        size = tensors[i].numel() * tensors[i].element_size()
        known = _NAMES.get(tensors[i].dtype)
        shape = list(tensors[i].shape) if known else [size]
        header[names[i]] = {"dtype": known or "U8", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for i in order:
        if tensors[i].numel():
            yield _bytes(tensors[i].detach().cpu().contiguous())


def read(
    path: Path, record: FileRecord, expected: Mapping[str, tuple[torch.dtype, Sequence[int]]]
) -> dict[str, Tensor]:
    """Read a file and verify it in the same pass; every tensor gets its own memory.

    Args:
        path: the file.
        record: its size and checksum.
        expected: dtype and shape of every tensor in the file, by name.

    Raises:
        CheckpointError: if size, checksum or header differ from what was written, or the file holds other tensors.
        OSError: if it cannot be read.
    """
    digest = xxhash.xxh3_128()
    found: dict[str, Tensor] = {}
    with path.open("rb", buffering=0) as file:

        def take(target: memoryview) -> None:
            done = 0
            while done < len(target):
                count = file.readinto(target[done : done + (16 << 20)])
                if not count:
                    raise CheckpointError(f"{path.name} is shorter than expected")
                digest.update(target[done : done + count])
                done += count

        start = bytearray(8)
        take(memoryview(start))
        length = int.from_bytes(start, "little")
        if length > min(_HEADER_LIMIT, record.bytes - 8):
            raise CheckpointError(f"{path.name} has a damaged header")
        text = bytearray(length)
        take(memoryview(text))
        offsets = _read_offsets(path, text)
        if set(offsets) != set(expected):
            raise CheckpointError(f"{path.name} has a damaged header")
        for name in sorted(offsets, key=lambda each: offsets[each]):
            dtype, shape = expected[name]
            tensor = torch.empty(list(shape), dtype=dtype)
            if tensor.numel() * tensor.element_size() != offsets[name][1] - offsets[name][0]:
                raise CheckpointError(f"{path.name} has a damaged header")
            if tensor.numel():
                take(_bytes(tensor))
            found[name] = tensor
        if file.read(1):
            raise CheckpointError(f"{path.name} is longer than expected")
    if digest.hexdigest() != record.xxh3_128:
        raise CheckpointError(f"{path.name} does not match its checksum")
    return found


def _read_offsets(path: Path, text: bytearray) -> dict[str, tuple[int, int]]:
    try:
        offsets = {name: tuple(entry["data_offsets"]) for name, entry in json.loads(text).items()}
        spans = sorted(offsets.values())
        without_gap = all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        without_gap = False
    if not without_gap:
        raise CheckpointError(f"{path.name} has a damaged header")
    return offsets


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
