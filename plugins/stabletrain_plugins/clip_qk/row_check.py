"""Whether the queries and keys of an attention are the rows of a projection, so that scaling rows scales logits."""

from __future__ import annotations

import torch
from torch import Tensor

from stabletrain.runtime.observing.attention import AttentionCall
from stabletrain_plugins.clip_qk.projections import Projection

_TOLERANCE = 1e-3
_LOW_PRECISION_TOLERANCE = 2e-2
"""Of norms, relative to the largest norm of their head."""


def mismatch(call: AttentionCall, projection: Projection, queries: Tensor, keys: Tensor) -> str | None:
    """What speaks against it; an empty text if nothing does, None if these numbers cannot tell.

    Rotations of queries and keys (rotary positions) and a common factor keep the ratio of their norms to those of the
    rows; a norm layer (qk-norm), a compressed key (MLA) and another layout of the heads do not. Reads from the device.

    Args:
        call: of the attention.
        projection: that is to be scaled.
        queries: output of its query projection in this forward pass, (..., rows).
        keys: output of its key projection.
    """
    fused = queries is keys
    split = projection.heads * projection.width
    parts = (
        ("queries", call.query, queries[..., :split], projection.heads),
        ("keys", call.key, keys[..., split:] if fused else keys, projection.kv_heads),
    )
    unknown = False
    for what, seen, computed, heads in parts:
        found = _norms_of_call(seen)
        rows = computed.detach().reshape(-1, computed.shape[-1])[:, : heads * projection.width]
        norms = torch.linalg.vector_norm(rows.reshape(len(rows), heads, projection.width).float(), dim=-1)
        norms = norms.repeat_interleave(found.shape[1] // heads, 1) if found.shape[1] % heads == 0 else norms
        if found.shape != norms.shape:
            here = f"{found.shape[1]} heads at {found.shape[0]} positions"
            return f"the attention has {what} of {here}, and the projection {norms.shape[1]} heads at {norms.shape[0]}"
        if not bool(torch.isfinite(found).all() & torch.isfinite(norms).all()) or not bool(norms.any()):
            unknown = True
            continue
        # sorted, since the positions may be in another order
        found, norms = found.sort(0).values, norms.sort(0).values
        difference = (found * (norms.sum() / found.sum()) - norms).abs().amax(0) / norms.amax(0)
        low = min(torch.finfo(each.dtype).bits for each in (seen, computed)) < 32
        if not float(difference.nan_to_num(nan=0.0).max()) <= (_LOW_PRECISION_TOLERANCE if low else _TOLERANCE):
            return f"the {what} of the attention are not the {what} that the projection computes, nor rotations of them"
    return None if unknown else ""


def _norms_of_call(tensor: Tensor) -> Tensor:
    """(positions, heads) norms of queries or keys (..., heads, positions, width)."""
    norms: Tensor = torch.linalg.vector_norm(tensor.float(), dim=-1)
    return norms.transpose(-1, -2).reshape(-1, norms.shape[-2])
