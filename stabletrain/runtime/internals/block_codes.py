"""bitsandbytes' codes of 8 bits: blocks of 256 elements with one scale each, and one table of values."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale in bitsandbytes' state."""


def decoded(codes: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """The values of codes, in float32.

    Args:
        codes: uint8; of AdEMAMix two moments, stacked.
        table: the value of each code, 256.
        scales: one for each block; two rows for two moments.

    Raises:
        ValueError: if they do not belong together.
    """
    if scales.ndim == 2:  # AdEMAMix: two moments in one tensor, the blocks of each by themselves
        return torch.stack([decoded(*pair) for pair in zip(codes, [table] * len(codes), scales, strict=True)])
    if scales.numel() != -(-codes.numel() // BLOCK) or table.numel() != 256:
        raise ValueError(f"8-bit state of {codes.numel()} elements has {scales.numel()} scales")
    each = scales.repeat_interleave(BLOCK)[: codes.numel()]
    return (table[codes.reshape(-1).int()] * each).view(codes.shape)


def encoded(wide: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a float32 tensor; blocks that `decoded` has made get the codes and values that they had.

    bitsandbytes alone would change them: its signed table ends at -0.993 and 1, so that the scale of a block is not the
    largest absolute value that was decoded if that is negative; and on the CPU it takes a neighbour of some codes.

    Args:
        wide: contiguous.
        table: ascending values of the codes, 256.
    """
    quantize = importlib.import_module("bitsandbytes.functional").quantize_blockwise
    quantized, state = quantize(wide, code=table, blocksize=BLOCK)
    scales: Tensor = state.absmax
    rows, codes = _blocks(wide), _blocks(quantized)
    negative = rows.amin(1) == -scales
    guess = torch.where(negative, scales / -table.min(), scales) if table.min() < 0 else scales
    chosen = ((scales > 0) & guess.isfinite()).nonzero().flatten()
    for width in (16, BLOCK):  # the first elements rule out most blocks that were not decoded
        some, scale = rows[chosen, :width], guess[chosen, None]
        off = (table[_nearest(some / scale, table)] * scale - some).abs()
        chosen = chosen[(off <= 1e-6 * some.abs()).all(1)]
    rows, guess = rows[chosen], guess[chosen]
    found = _nearest(rows / guess[:, None], table)
    for ulps in (-2, 2, -1, 1, 0):  # the product and the quotient were rounded
        scale = (guess.view(torch.int32) + ulps).view(torch.float32)
        same = (table[found] * scale[:, None] == rows).all(1)
        scales[chosen[same]], codes[chosen[same]] = scale[same], found[same].to(torch.uint8)
    return codes.flatten()[: wide.numel()].view(wide.shape), scales


def _blocks(tensor: Tensor) -> Tensor:
    return torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % BLOCK)).view(-1, BLOCK)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """The places of the nearest values in a table, which ascends."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)
