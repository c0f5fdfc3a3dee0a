"""Counts the messages between ranks, by kind."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stabletrain.planning.plan import Collective

_KINDS = {
    "reduce_scatter": "reduce-scatter",
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
    "broadcast": "broadcast",
}
"""Parts of the names of torch's operators, and what they are called here."""

Counts = dict[str, tuple[int, int]]
"""By kind: how many messages, and bytes of their whole tensors."""


class CountCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives while it is active; it works on real ranks, too.

    The bytes of a message are those of the whole tensor: the larger one of what goes in and what comes out.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counts = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and count it if it is a collective."""
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # first DTensor makes plain operators of it
        out = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace and (kind := kind_of(func.__name__)):
            # lists of lists are in the arguments of gathers: the parts of one whole tensor
            sizes = [_bytes(each) for each in (*args, out)]
            count, total = self.counts.get(kind, (0, 0))
            self.counts[kind] = (count + 1, total + max(sizes, default=0))
        return out


def kind_of(operator: str) -> str | None:
    """The kind of collective that an operator of torch is; None: it is none.

    >>> kind_of("_reduce_scatter_base_.default"), kind_of("wait_tensor.default")
    ('reduce-scatter', None)
    """
    return next((kind for part, kind in _KINDS.items() if part in operator), None)


def of_step(first: Counts, last: Counts, micro_batches: int) -> list[Collective]:
    """The collectives of a step with so many micro-batches, in descending order of bytes.

    Args:
        first: in a micro-batch that is not the last one.
        last: in the last one, with the optimizer step.
        micro_batches: in a step.
    """
    found = []
    for kind in {*first, *last}:
        (count, size), (at_end, size_at_end) = first.get(kind, (0, 0)), last.get(kind, (0, 0))
        repeated = micro_batches - 1
        found.append(Collective(kind=kind, count=count * repeated + at_end, bytes=size * repeated + size_at_end))
    return sorted(found, key=lambda each: (-each.bytes, each.kind))


def _bytes(value: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tree_leaves(value) if isinstance(each, Tensor))
