"""The gradient of a window is the mean over its tokens, on all ranks, however they are spread over micro-batches."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from stabletrain.errors import UserError, require
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.missing_loss import NoBatch
from stabletrain.runtime.guard.support import refuse_manual
from stabletrain.runtime.windows.batches import BatchCount, Count, check_count
from stabletrain.runtime.windows.zero_gradients import ZeroGradients
from stabletrain.settings import worded

_NOTHING_COUNTED = 100
"""Micro-batches from the start of a run, all with a count of 0, after which the count must be wrong."""


class AccumulateTokens(GuardMember):
    """Weight each micro-batch by its number of tokens, so that a window equals one big batch.

    A module that returns a mean over the tokens of a micro-batch makes each micro-batch count the same, however few
    tokens it has. With this plugin loss and gradient of a step are means over all tokens in the window, on all ranks.
    A micro-batch with a count of 0, whose mean is NaN, adds nothing; a window with a count of 0 is dropped as a step
    never seen.

    Args:
        count: what is counted in a batch. A function of the batch that returns a whole number, or the key, attribute or
            position of an entry, of which the elements other than ``ignore_index`` count; None: the rows of the first
            tensor, which is said once.
        ignore_index: elements of that entry with this value do not count; None: all do.
        reduction: what ``training_step`` returns: ``"mean"`` over what is counted, or ``"sum"``.

    Raises:
        UserError: if an argument is wrong; when training starts, if the module steps by hand; in training, if ``count``
            does not return a whole number >= 0, or has been 0 for the first 100 micro-batches.

    >>> from lightning.pytorch import Trainer
    >>> plugins = [AccumulateTokens(count="labels")]
    >>> trainer = Trainer(accumulate_grad_batches=4, callbacks=plugins, logger=False, accelerator="cpu")
    """

    plugin: ClassVar[str] = "accumulate_tokens"
    slot: ClassVar[str] = "accumulate"

    def __init__(
        self,
        count: Count = None,
        ignore_index: int | None = -100,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        check_count(count, ignore_index, self._require)
        self._require(reduction in ("mean", "sum"), "reduction", '"mean" or "sum"', reduction)
        self.count = count
        self.ignore_index = ignore_index
        self.reduction = reduction
        self._zero = ZeroGradients()
        self.reset()

    def _require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        require(ok, self.plugin, argument, expected, got, f"plugins.{self.slot}", type(self).__name__)

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def reset(self) -> None:
        """Forget the size of a micro-batch, which the first one of a run sets."""
        self._reference: float | None = None
        self._empty = 0
        self._here = 0

    def guard_options(self) -> dict[str, Any]:
        """The guard weights the micro-batches."""
        return {"weigh_loss": self._weigh}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register with the guard."""
        if stage == "fit":
            refuse_manual(type(self).__name__, pl_module)
            setting = worded(f"{self.plugin}: plugins.{self.slot}.count", self.slot, type(self).__name__)
            self._counts = BatchCount(self.count, self.ignore_index, setting)
        super().setup(trainer, pl_module, stage)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the tokens of the micro-batch; in the first one all ranks agree on a reference."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._here = 0 if isinstance(batch, NoBatch) else self._counts(batch, tells=trainer.is_global_zero)
        if self._reference is None:
            self._agree(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The backward pass is over."""
        self._zero.remove()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let gradients be what they are."""
        self._zero.remove()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let gradients be what they are."""
        self._zero.remove()
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """The reference that the ranks agreed on."""
        return {**super().state_dict(), "reference": self._reference}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        super().load_state_dict(state_dict)
        reference = state_dict.get("reference")
        self._reference = None if reference is None else float(reference)

    def _agree(self, trainer: Trainer) -> None:
        assert self._guard is not None, "the guard is created in setup"
        (total,) = self._guard.ranks.sum(float(self._here))
        if total > 0:
            # a power of two: multiplying by it rounds nothing, so that the result does not depend on it
            self._reference = 2.0 ** round(math.log2(total / self._guard.ranks.size))
            return
        self._empty += 1
        if self._empty >= _NOTHING_COUNTED:
            key = worded(f"plugins.{self.slot}.count", self.slot, type(self).__name__)
            raise UserError(
                f"{self.plugin}: the count of each of the first {self._empty} micro-batches is 0: nothing is trained. "
                f"Expected the number of elements over which the loss is a mean: look at {key}={self.count!r} and "
                f"ignore_index={self.ignore_index!r}"
            )

    def _weigh(self, loss: Tensor) -> float:
        """Multiply a loss in place by its weight; return what it adds to the window's sum of weights."""
        self._zero.remove()
        if not self._here or self._reference is None:
            assert self._guard is not None, "the guard is created in setup"
            self._zero.during(loss, self._guard.module.parameters())
            return 0.0
        share = self._here / self._reference
        loss.mul_(share if self.reduction == "mean" else 1.0 / self._reference)
        return share
