"""Gradient checkpointing of chosen blocks of an unmodified module."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabletrain.core.planned import Planned, Sizes
from stabletrain.errors import UserError, require
from stabletrain.runtime import rng
from stabletrain.runtime.hidden.second_forward import SecondForward
from stabletrain.runtime.internals.forward import wrap_forward
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.internals.trainer import has_all_modules
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.windows.batches import tensors_of
from stabletrain.settings import worded


class CheckpointActivations(Callback):
    """Compute the activations of chosen blocks again in the backward pass, instead of keeping them.

    Weights are bit for bit those without it: random numbers and buffers are for the second forward pass what they were
    for the first. In the first training step the memory of activations that it saves is measured and logged.

    Args:
        blocks: a regular expression for the whole name of a module; None: the items of the longest ``nn.ModuleList`` or
            ``nn.Sequential`` whose items have one class, or if there is none, of the longest one.
        every: of the blocks found, every how many-th is checkpointed, >= 1.

    Raises:
        UserError: if an argument is wrong; when training starts, if no module, or one within another, is chosen.

    >>> CheckpointActivations(r"model\\.layers\\.\\d+").every
    1
    """

    plugin: ClassVar[str] = "checkpoint_activations"
    slot: ClassVar[str] = "activations"

    def __init__(self, blocks: str | None = None, every: int = 1) -> None:
        whole = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        self._require(whole, "every", "a whole number >= 1", every)
        try:
            re.compile(blocks or "")
        except (re.error, TypeError):
            self._require(False, "blocks", "a regular expression, or null", blocks)
        self.blocks = blocks
        self.every = every
        self._undo: list[Callable[[], None]] = []

    def _require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        require(ok, self.plugin, argument, expected, got, f"plugins.{self.slot}", type(self).__name__)

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def prepare_trainer(self, trainer: Trainer, module: LightningModule) -> None:
        """Check before a fit that blocks are found, unless ``configure_model`` is still to make them.

        Args:
            trainer: that this callback is in.
            module: to be trained.

        Raises:
            UserError: as the fit would raise it.
        """
        if has_all_modules(module):
            self._chosen(module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the forward pass of the blocks for this fit."""
        self._restore()
        chosen = self._chosen(pl_module)
        self._tells = trainer.is_global_zero
        self._saved, self._unmeasured = 0, len(chosen)
        self._names = [name for name, _ in chosen]
        for _, block in chosen:
            self._wrap(block)

    def plan_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """In a dry run: as `on_fit_start`, without measuring what is saved.

        Args:
            trainer: of the traced steps.
            module: whose blocks are changed.
        """
        self._restore()
        for _, block in self._chosen(module):
            self._wrap(block, measures=False)

    def planned(self, trainer: Trainer, sizes: Sizes) -> Planned:
        """What it will do, for a dry run.

        Args:
            trainer: of the traced steps.
            sizes: of the run.
        """
        names = [name for name, _ in self._chosen(trainer.lightning_module)]
        return Planned(text=f"computes the activations of {len(names)} blocks again in backward ({names[0]}, ...)")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the blocks' own forward pass."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the blocks' own forward pass."""
        self._restore()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running fit."""
        return {**self.__dict__, "_undo": []}

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _chosen(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        key = worded(f"{self.plugin}: plugins.{self.slot}.blocks", self.slot, type(self).__name__)
        if self.blocks is None:
            found = _longest_list(module)
        else:
            found = [(name, each) for name, each in module.named_modules() if re.fullmatch(self.blocks, name)]
        if not found:
            names = ", ".join([name for name, _ in module.named_modules() if name][:12])
            raise UserError(
                f"{key}: no module is chosen by {self.blocks!r}. Expected a regular expression for the whole "
                f"name of the blocks; the modules are {names}, ..."
            )
        for name, block in found:
            inner = {id(each) for each in block.modules()} - {id(block)}
            if within := next((other for other, each in found if id(each) in inner), None):
                raise UserError(f"{key}: {within} lies within {name}, and both are chosen. Choose one of them")
        return found[:: self.every]

    def _wrap(self, block: nn.Module, *, measures: bool = True) -> None:
        measured = not measures

        def around(block: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal measured
            if not (block.training and torch.is_grad_enabled()):
                return inner(*args, **kwargs)
            if not measured:
                measured = True
                self._measure(block, inner, args, kwargs)
            again = SecondForward(block, (args, kwargs))
            return checkpoint(inner, *args, use_reentrant=False, context_fn=again.contexts, **kwargs)

        self._undo.append(wrap_forward(block, around))

    def _measure(self, block: nn.Module, inner: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Add what the block would have kept, found by one more forward pass, after which everything is put back."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        state, again = rng.capture(), SecondForward(block, (args, kwargs))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), again.put_back_after():
            inner(*args, **kwargs)
        rng.restore(state)
        for tensor in (*block.parameters(), *block.buffers(), *tensors_of([args, kwargs])):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        self._saved += sum(kept.values())
        self._unmeasured -= 1
        if not self._unmeasured and self._tells:
            logger.info(
                "activations of %d blocks (%s) are computed again: %.1f MB less is kept for a micro-batch",
                len(self._names),
                ", ".join(self._names[:3]) + (", ..." if len(self._names) > 3 else ""),
                self._saved / 1e6,
            )


def _longest_list(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The items of the longest list of modules of one class; if there is none, those of the longest list."""
    best: list[tuple[str, nn.Module]] = []
    other: list[tuple[str, nn.Module]] = []
    for name, each in module.named_modules():
        if isinstance(each, nn.ModuleList | nn.Sequential):
            items = [(f"{name}.{key}" if name else key, child) for key, child in each.named_children()]
            if len(items) > max(1, len(best)) and len({type(child) for _, child in items}) == 1:
                best = items
            other = max(other, items, key=len)
    return best or other
