"""A micro-batch that does not fit in memory is run in pieces, with the gradient of the whole."""

from __future__ import annotations

import contextlib
import math
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from stabletrain.errors import UserError, require
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.missing_loss import NoBatch
from stabletrain.runtime.guard.support import refuse_manual
from stabletrain.runtime.internals.micro_batch import MicroBatch, around_micro_batches, not_logging
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.windows.before import Before
from stabletrain.runtime.windows.pieces import rows, split
from stabletrain_plugins.accumulate_auto.memory import free_cached, is_out_of_memory

_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TOLERANCE, _TOLERANCE_MIXED = 1e-3, 3e-2
"""Relative difference of the loss of a piece and of its halves that is rounding, in single and in mixed precision."""


class AccumulateAuto(GuardMember):
    """Run micro-batches in pieces once one has not fit in memory.

    After an out-of-memory error in the forward or backward pass the number of pieces doubles on all ranks, everything
    that the micro-batch has changed goes back, and the same batch is run again; later ones are run in as many pieces.
    The gradient is that of the whole, but for rounding.

    Args:
        pieces: of each micro-batch at the start, >= 1.
        check_loss: at the first split, check that the loss is a mean over the rows of the batch, by one more forward
            pass in evaluation mode. False: it is known to be.

    Raises:
        UserError: if ``pieces`` is out of range; when training starts, if the module steps by hand, the strategy is
            not DDP or a single device, or a batch cannot be split; at the first split, if the module normalises over
            the batch, or the loss is no mean over rows.

    >>> AccumulateAuto().pieces
    1
    """

    plugin: ClassVar[str] = "accumulate_auto"
    slot: ClassVar[str] = "accumulate"

    def __init__(self, pieces: int = 1, check_loss: bool = True) -> None:
        whole = isinstance(pieces, int) and not isinstance(pieces, bool) and pieces >= 1
        require(whole, self.plugin, "pieces", "a whole number >= 1", pieces, f"plugins.{self.slot}", "AccumulateAuto")
        self.pieces = pieces
        self.check_loss = check_loss
        self._undo: Any = None
        self._is_training = False
        self.reset()

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def reset(self) -> None:
        """Begin with the first number of pieces."""
        self._pieces = self.pieces
        self._checked = not self.check_loss
        self._seen = False

    def guard_options(self) -> dict[str, Any]:
        """The guard weighs shorter windows."""
        return {"weigh_windows": True}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register with the guard."""
        if stage == "fit":
            refuse_manual(type(self).__name__, pl_module)
            if not isinstance(trainer.strategy, (*both(DDPStrategy), *both(SingleDeviceStrategy))):
                raise UserError(
                    f"{type(self).__name__}: ranks that share a model cannot run a forward pass again alone, so "
                    f"{type(trainer.strategy).__name__} is not supported. Use strategy=ddp, or smaller batches with "
                    "plugins/accumulate=fixed"
                )
            self._seen = False
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the forward and backward pass of each micro-batch."""
        super().on_train_start(trainer, pl_module)
        self._restore()
        self._before = Before(pl_module)
        self._undo = around_micro_batches(trainer, self._run)
        self._is_training = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give it back to Lightning."""
        self._restore()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back to Lightning."""
        self._restore()
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """The number of pieces."""
        return {**super().state_dict(), "pieces": self._pieces, "checked": self._checked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint; a rollback does not make larger pieces fit."""
        super().load_state_dict(state_dict)
        saved = int(state_dict.get("pieces", self.pieces))
        self._pieces = max(saved, self._pieces) if self._is_training else saved
        self._checked = bool(state_dict.get("checked", self._checked)) or self._checked

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running fit."""
        return {key: value for key, value in super().__getstate__().items() if key not in ("_undo", "_before")}

    def _restore(self) -> None:
        self._is_training = False
        if self._undo is not None:
            self._undo()
            self._undo = None
            del self._before

    # ---- a micro-batch ----------------------------------------------------------------------------------------------

    def _run(self, part: MicroBatch) -> Any:
        assert self._guard is not None, "the guard is created in setup"
        guard, ranks = self._guard, self._guard.ranks
        if part.has_batch and isinstance(part.batch, NoBatch):
            pieces = [(part.batch, 1)]
        else:
            self._check_support(part)
            pieces = split(part.batch, self._pieces, type(self).__name__) if rows(part.batch) else [(part.batch, 1)]
        total = sum(size for _, size in pieces)
        self._before.keep(guard.window, gradients=not part.starts_window)
        tried: list[str] = []
        while True:
            result, failure = self._try(part, pieces, total)
            state = 0 if failure is None else 1 if len(pieces) < total else 2
            worst = ranks.max(state)
            if not worst:
                break
            free_cached()
            self._before.restore(guard.window)
            tried.append(f"{-(-total // len(pieces))}")
            if worst == 2:
                self._give_up(failure, tried)
            self._refuse_batch_norm()
            self._pieces *= 2
            pieces = split(part.batch, self._pieces, type(self).__name__) if total > 1 else pieces
            if ranks.is_first:
                logger.warning(
                    "out of memory with %s rows at once: the micro-batch is run again, and later ones, in %d pieces",
                    tried[-1],
                    self._pieces,
                )
        self._before.join(guard.window)
        if ranks.size > 1 and part.ends_window:
            ranks.average_(guard.module.parameters())
        if self._pieces > 1 and not self._checked:
            self._checked = True
            self._check_loss(part, pieces)
        return result

    def _try(self, part: MicroBatch, pieces: list[tuple[Any, int]], total: int) -> tuple[Any, Exception | None]:
        assert self._guard is not None, "the guard is created in setup"
        several = self._guard.ranks.size > 1
        try:
            with part.without_collectives() if several else contextlib.nullcontext():
                return self._in_pieces(part, pieces, total), None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # what the frames of the forward pass hold is freed with its traceback
            error.__traceback__ = error.__context__ = None
            return None, error

    @staticmethod
    def _in_pieces(part: MicroBatch, pieces: list[tuple[Any, int]], total: int) -> Any:
        whole: Any = None
        loss: Any = None
        for i, (batch, size) in enumerate(pieces):
            result = part.forward(batch)
            if len(pieces) > 1 and result.closure_loss is not None:
                result.closure_loss = result.closure_loss * (size / total)
                result.loss = result.loss * (size / total)
            if not i:
                part.zero_grad()
            if result.closure_loss is not None:
                part.backward(result.closure_loss)
                loss = result.loss if loss is None else loss + result.loss
            result.closure_loss = None if result.closure_loss is None else result.closure_loss.detach()
            whole = result
        whole.loss = loss
        return whole

    def _give_up(self, failure: Exception | None, tried: list[str]) -> None:
        sizes = f"rows at once that were tried: {', '.join(tried)}"
        if failure is None:
            raise torch.OutOfMemoryError(f"another rank is out of memory with a single row; {sizes}")
        failure.add_note(f"{type(self).__name__}: out of memory with a single row; {sizes}")
        raise failure

    # ---- where it would be wrong ------------------------------------------------------------------------------------

    def _check_support(self, part: MicroBatch) -> None:
        """In the first micro-batch of a fit: what cannot be split is refused before it has to be."""
        if self._seen:
            return
        self._seen = True
        assert self._guard is not None, "the guard is created in setup"
        name = type(self).__name__
        if not part.has_batch:
            raise UserError(f"{name}: training_step takes an iterator over the loader, of which no batch can be split")
        if self._pieces > 1:
            self._refuse_batch_norm()
        elif (found := self._batch_norm()) and self._guard.ranks.is_first:
            logger.warning("%s: %s: a batch that does not fit in memory will be an error", name, found)
        split(part.batch, 2, name) if rows(part.batch) else None

    def _batch_norm(self) -> str:
        """The first module that normalises over a batch; empty if there is none."""
        assert self._guard is not None, "the guard is created in setup"
        for path, child in self._guard.module.named_modules():
            over_batch = isinstance(child, _BATCH_NORM) or "batchnorm" in type(child).__name__.lower()
            if child.training and (over_batch or getattr(child, "track_running_stats", False)):
                return f"{path} ({type(child).__name__}) normalises over the rows of a batch"
        return ""

    def _refuse_batch_norm(self) -> None:
        if found := self._batch_norm():
            raise UserError(
                f"{type(self).__name__}: {found}, so a batch in pieces has another gradient. Use LayerNorm or "
                "GroupNorm, or smaller batches (plugins/accumulate=none)"
            )

    def _check_loss(self, part: MicroBatch, pieces: list[tuple[Any, int]]) -> None:
        """Compare the loss of a piece with that of its halves, without dropout, and put everything back."""
        assert self._guard is not None, "the guard is created in setup"
        module, ranks, window, name = self._guard.module, self._guard.ranks, self._guard.window, type(self).__name__
        piece, size = pieces[0] if pieces[0][1] > 1 else split(part.batch, -(-rows(part.batch) // 2), name)[0]
        halves = split(piece, 2, name)
        modes = [(child, child.training) for child in module.modules()]
        after = Before(module)
        after.keep(window, gradients=False)
        losses: list[float] = []
        try:
            with torch.no_grad(), not_logging(module), part.without_collectives():
                for child, _ in modes:
                    child.training = False
                for batch, _ in [(piece, size), *halves]:
                    after.restore_random()
                    loss = part.forward(batch).loss
                    losses.append(math.nan if loss is None else float(loss))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            losses = []
        finally:
            for child, training in modes:
                child.training = training
            after.restore(window)
        known = len(losses) == 3 and all(map(math.isfinite, losses))
        expected = sum(loss * n for loss, (_, n) in zip(losses[1:], halves, strict=False)) / size if known else 0.0
        mixed = self._guard.trainer.precision not in ("32-true", "64-true")
        tolerance = _TOLERANCE_MIXED if mixed else _TOLERANCE
        wrong = known and abs(losses[0] - expected) > tolerance * max(abs(losses[0]), abs(expected))
        if ranks.any(wrong):
            raise UserError(
                f"{name}: the loss is no mean over the rows of a batch: that of {size} rows is {losses[0]:.6g}, and "
                f"the mean over its halves {expected:.6g}. So a batch in pieces has another gradient, as with "
                "contrastive losses, sums, or means over a number of tokens that differs between rows. Use smaller "
                "batches, or plugins.accumulate.check_loss=false if the difference is random"
            )
