"""The operations that torch dispatches in each batch of a fit, and the reads of the device among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("local_scalar_dense", "is_nonzero", "aten.equal", "aten.nonzero")


class Count(TorchDispatchMode):
    """Counts operations, and those with which the host reads the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.reads += any(name in str(func) for name in _READS)
        return func(*args, **(kwargs or {}))


def counts(train: Callable[[list[Callback]], object], *callbacks: Callback) -> list[tuple[int, int]]:
    """The operations and reads of each batch, except those of the last one, which ends with a flush.

    Args:
        train: trains with the callbacks that it is given.
        callbacks: of which the operations are counted, too.
    """
    found: list[tuple[int, int]] = []
    modes: list[Count] = []

    def start(*_: Any) -> None:
        modes.append(Count().__enter__())

    def end(*_: Any) -> None:
        modes[-1].__exit__(None, None, None)
        found.append((modes[-1].operations, modes[-1].reads))

    first, last = LambdaCallback(on_train_batch_start=start), LambdaCallback(on_train_batch_end=end)
    train([first, *callbacks, last])
    return found[:-1]
