"""Whether two runs ended alike, bit for bit; and if not, where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stabletrain.runtime.checkpoints import load


def final_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a folder, but for the identity of the run, which every beginning draws anew."""
    checkpoint = load(folder)
    del checkpoint["callbacks"]["save_checkpoints"]
    return checkpoint


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """The places at which two trees differ; a NaN equals a NaN of the same bits."""
    if type(one) is not type(other):
        yield f"{at}: {type(one).__name__} and {type(other).__name__}"
    elif isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(_bits(one), _bits(other)):
            yield at
    elif isinstance(one, Mapping):
        for key in sorted({*one, *other}, key=str):
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{at}.{key}")
            else:
                yield f"{at}.{key}: only in one"
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{at}: {len(one)} and {len(other)} of them"
        for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
            yield from differences(mine, theirs, f"{at}[{index}]")
    elif repr(one) != repr(other):
        yield f"{at}: {one!r} and {other!r}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
