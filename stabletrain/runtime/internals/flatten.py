"""Several tensors as one vector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._utils import _flatten_dense_tensors


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as one vector, to be read only; one call, where `torch.cat` needs one more for each tensor.

    Args:
        tensors: at least one, all dense, of one dtype and on one device.
    """
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat
