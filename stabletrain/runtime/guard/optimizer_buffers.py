"""The buffers that a dropped step restores, where a module has several optimizers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.runtime.guard.module_buffers import ModuleBuffers


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class BuffersOfOptimizer:
    """The buffers that a dropped step of one optimizer restores.

    Those of modules which it alone trains are as before its first backward pass for this step. Forward has changed
    those of others too, such as the discriminator's when the generator's loss was computed: they are as after the last
    step of their own optimizer, or as at the beginning of the batch if that is later.

    Args:
        own: buffers of the modules that only this optimizer trains.
        others: all other buffers.
        shared: those of ``others`` that belong to no optimizer alone; they are copied with ``own``.

    Attributes:
        modules: those whose buffers are copied; their hidden state is copied with them.
    """

    def __init__(self, own: ModuleBuffers, others: Sequence[ModuleBuffers], shared: ModuleBuffers) -> None:
        self._own, self._others, self._shared = own, others, shared
        self.modules: Collection[nn.Module] | None = frozenset((*(own.modules or ()), *(shared.modules or ())))

    def stash(self) -> None:
        """Copy those that are its own or shared."""
        self._own.stash()
        self._shared.stash()

    def restore(self) -> None:
        """Restore all."""
        for each in (self._own, *self._others):
            each.restore()

    def restore_if_nonfinite(self) -> None:
        """Restore those of each optimizer where a NaN or infinity has come into one since they were copied."""
        for each in (self._own, *self._others):
            each.restore_if_nonfinite()

    def restore_where(self, dropped: Tensor) -> None:
        """Decided on the device: never, with manual optimization the host decides."""
        raise NotImplementedError("manual optimization decides on the host")


def buffers_of_optimizers(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[BuffersOfOptimizer]:
    """The buffers that a dropped step restores, for each optimizer."""
    owner = _owners(module, optimizers)

    def of(index: int | None) -> ModuleBuffers:
        return ModuleBuffers(module, lambda child: owner.get(child) == index)

    shared = of(None)
    own = [of(index) for index in range(len(optimizers))]
    return [BuffersOfOptimizer(each, [shared, *(other for other in own if other is not each)], shared) for each in own]


def _owners(module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[nn.Module, int]:
    """Of submodules: the only optimizer that trains its parameters, or else the nearest ones around it."""
    of = {id(p): index for index, optimizer in enumerate(optimizers) for p in parameters_of(optimizer)}
    owners: dict[nn.Module, int] = {}
    for path, child in module.named_modules():
        names = path.split(".") if path else []
        for depth in range(len(names), -1, -1):
            around = module.get_submodule(".".join(names[:depth]))
            trained = {of[id(p)] for p in around.parameters() if id(p) in of}
            if trained:
                if len(trained) == 1:
                    owners[child] = trained.pop()
                break
    return owners
